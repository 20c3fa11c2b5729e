"""A CUDA device simulated in host memory, for CPU-only builds of torch (docs/development.md).

python tests/simulated_cuda run scripts/text_to_3d.py prompt="a red teapot" run.steps=2
python tests/simulated_cuda waits scripts/text_to_3d.py prompt="a red teapot" run.steps=3
python tests/simulated_cuda pytest -m gpu
"""
