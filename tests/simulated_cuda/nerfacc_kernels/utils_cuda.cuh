// In place of nerfacc's header of the same name: what its kernels need of CUDA, for the host's compiler.
#pragma once
#include <torch/extension.h>

#include <algorithm>
#include <cmath>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define CHECK_CUDA(x) TORCH_CHECK(x.is_cuda(), #x " must be a CUDA tensor")
#define CHECK_CONTIGUOUS(x) TORCH_CHECK(x.is_contiguous(), #x " must be contiguous")
#define CHECK_INPUT(x) \
  CHECK_CUDA(x);       \
  CHECK_CONTIGUOUS(x)
#define DEVICE_GUARD(x) CHECK_CUDA(x)

#define SIMULATED_VECTORS(scalar, name)                                                       \
  struct name##2 {                                                                            \
    scalar x, y;                                                                              \
  };                                                                                          \
  struct name##3 {                                                                            \
    scalar x, y, z;                                                                           \
  };                                                                                          \
  struct name##4 {                                                                            \
    scalar x, y, z, w;                                                                        \
  };                                                                                          \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                        \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }           \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
SIMULATED_VECTORS(float, float)
SIMULATED_VECTORS(int, int)
SIMULATED_VECTORS(unsigned, uint)
#undef SIMULATED_VECTORS

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// One thread: the kernels loop over the grid.
static const dim3 blockIdx(0, 0, 0), threadIdx(0, 0, 0), blockDim(1, 1, 1), gridDim(1, 1, 1);

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename T>
inline T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
