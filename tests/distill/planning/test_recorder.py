import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from distill.planning.recorder import BACKWARD, FORWARD, OTHER, MetaRecorder
from distill.planning.teachers import meta_teacher
from distill.runtime.precision import Precision


def flops(recorder, step) -> float:
    with recorder.measured() as record:
        step()
    return record.flops


def test_work_of_stable_diffusion():
    """Counted on the meta device by hand beforehand, in TFLOP at 512 pixels (docs/gpu.md)."""
    teacher = meta_teacher("stable-diffusion-v1-5", torch.bfloat16)
    with MetaRecorder() as recorder:
        pair, t = torch.empty(2, 4, 64, 64, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
        conditioning = teacher.encode_text(["", "a red teapot"])
        images = torch.empty(1, 3, 512, 512, device="meta", requires_grad=True)
        with torch.no_grad():
            cfg = flops(recorder, lambda: teacher.predict(pair, t, conditioning))
            encode = flops(recorder, lambda: teacher.encode_images(images))
            decode = flops(recorder, lambda: teacher.decode(pair[:1]))
        both = flops(recorder, lambda: teacher.encode_images(images).sum().backward())
    counted = [value / 1e12 for value in (cfg, encode, both, decode)]
    assert [round(value, 3) for value in counted] == [1.607, 1.117, 2.268, 2.515]


def test_stable_diffusion_has_the_parameters_of_its_model_card():
    counts = {}
    for name in ("stable-diffusion-v1-5", "stable-diffusion-2-1"):
        teacher = meta_teacher(name, torch.float32)
        parts = (teacher.unet, teacher.vae, teacher.text_encoder)
        counts[name] = [round(sum(p.numel() for p in part.parameters()) / 1e6) for part in parts]
    assert counts == {"stable-diffusion-v1-5": [860, 84, 123], "stable-diffusion-2-1": [866, 84, 340]}


def test_components_and_directions():
    inner, outer = nn.Linear(4, 8), nn.Linear(8, 2)
    with MetaRecorder() as recorder:
        inner, outer = inner.to("meta"), outer.to("meta")
        recorder.attribute({"inner": inner, "outer": outer})
        with recorder.measured() as record:
            outer(inner(torch.empty(3, 4, device="meta")).relu()).sum().backward()
    work = {}
    for (component, direction, operation), count in record.operations.items():
        work[component, direction] = work.get((component, direction), 0) + operation.flops * count
    forward = {("inner", FORWARD): 2 * 3 * 4 * 8, ("outer", FORWARD): 2 * 3 * 8 * 2}
    backward = {("inner", BACKWARD): 2 * 3 * 4 * 8, ("outer", BACKWARD): 2 * 2 * 3 * 8 * 2}
    assert {key: value for key, value in work.items() if value} == forward | backward
    assert record.samples == {"inner": 3, "outer": 3}
    assert (OTHER, FORWARD) in work


def test_memory_is_what_is_alive():
    with MetaRecorder() as recorder:
        a = torch.empty(1024, 256, device="meta", requires_grad=True)
        assert recorder.live == 2**20
        b = a * 2
        c = b.exp()  # the result is saved for the backward pass, b is not
        assert recorder.live == 3 * 2**20
        del b
        assert recorder.live == 2 * 2**20
        view = c[:10]
        del c
        assert recorder.live == 2 * 2**20 and view.shape == (10, 256)
        view.sum().backward()
        del view
        assert recorder.live == 2 * 2**20  # the parameter and its gradient
    assert recorder.peak >= 3 * 2**20


def test_repeated_operations_have_the_shapes_and_the_dtypes_of_the_first():
    with MetaRecorder() as recorder, recorder.measured() as record:
        for _ in range(2):
            x = torch.empty(2, 3, 8, 8, device="meta", dtype=torch.bfloat16)
            y = F.conv2d(x.contiguous(memory_format=torch.channels_last), x.new_empty(5, 3, 3, 3))
            (mean,) = torch.empty(4, 6, device="meta").mean(0, keepdim=True)
            assert y.shape == (2, 5, 6, 6) and y.dtype == torch.bfloat16 and mean.shape == (6,)
            assert y.is_contiguous(memory_format=torch.channels_last)
    assert record.flops == 2 * 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)


def test_the_host_gets_answers():
    with MetaRecorder() as recorder:
        x = torch.empty(10, device="meta")
        assert bool(x.isfinite().all()) and float(x.sum()) == 1.0 and x.cpu().shape == (10,)
        assert len((x > 0).nonzero()) == 10
        with recorder.answering([3, 4], 7):
            assert len((x > 0).nonzero()) == 3 and len((x > 0).nonzero()) == 4 and int(x.amax()) == 7


def test_autocast_on_the_meta_device():
    layer, norm = nn.Linear(4, 8).to("meta"), nn.GroupNorm(2, 8).to("meta")
    with MetaRecorder(), Precision(torch.device("meta"), torch.bfloat16).autocast():
        y = layer(torch.empty(3, 4, device="meta"))
        assert y.dtype == torch.bfloat16 and norm(y).dtype == torch.float32
        query = torch.empty(1, 2, 16, 8, device="meta")
        assert F.scaled_dot_product_attention(query, query, query).dtype == torch.bfloat16


def test_attention_keeps_no_matrix():
    with MetaRecorder() as recorder:
        query = torch.empty(1, 1, 4096, 8, device="meta", requires_grad=True)
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert recorder.peak < 4096 * 4096


def test_random_modules_are_not_read(monkeypatch):
    """A teacher of a folder is built from its configs alone."""
    for module in (UNet2DConditionModel, AutoencoderKL):
        monkeypatch.setattr(module, "from_pretrained", None)
    teacher = meta_teacher("shapes64", torch.float32)
    assert teacher.latent_shape == (16, 8, 8) and teacher.resolution == 64 and teacher.device.type == "meta"
