"""A trained model as one file for programs without this package: torch.export, ONNX, or weights alone.

Raw samples go in and logits come out: standardisation is inside. What comes before it (decoding, size) and after it (names,
probabilities, the prior) is in a JSON file beside.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltkernels.train.checkpoint import dump, write_bytes
from ltkernels.train.predictor import Model, check_out, load

KINDS = {".pt2": "torch.export", ".onnx": "ONNX", ".safetensors": "weights", ".pt": "weights"}


def export(run: str | Path, out: str | Path, *, variant: str | None = None, force: bool = False) -> Path:
    """Write the model of a run to `out`, of the kind that its suffix says, and `out` with .json added, which describes it.

    `.pt2`: a program of `torch.export`, which `torch.export.load` reads; `.onnx`; `.safetensors` and `.pt` (read with
    weights_only=True): the state dict of `load(run).module`. Batches may have any size. Raises FileExistsError where a file is there
    and `force` is not given, ValueError, FileNotFoundError or ImportError (a package that is missing) in words; returns the path of
    the description.
    """
    out = Path(out)
    check_out(out, force, tuple(KINDS))
    beside = out.with_name(f"{out.name}.json")
    check_out(beside, force, (".json",))
    model = load(run, variant)
    shape = model.preprocessing.input_shape
    dtype = torch.uint8 if model.preprocessing.pictures else torch.float64
    content = _WRITERS[out.suffix](model.module, torch.zeros(3, *shape, dtype=dtype))
    write_bytes(out, content)
    write_bytes(beside, (json.dumps(_description(model, out.suffix, dtype), indent=1) + "\n").encode())
    return beside


def _description(model: Model, suffix: str, dtype: torch.dtype) -> dict[str, Any]:
    given = model.preprocessing
    steps = []
    if given.pictures:
        steps.append("decode as RGB, turned as EXIF says, transparent parts on white")
        if given.image_size is not None:
            steps.append(
                f"scale (bilinear, antialiased) until the shorter side has {given.image_size} pixels, cut to the central square"
            )
        steps.append("channels first")
    return {
        "format": KINDS[suffix],
        "input": {
            "name": "samples",
            "shape": ["batch", *given.input_shape],
            "dtype": str(dtype).removeprefix("torch."),
        },
        "before": steps,
        "inside": {"what": "(samples - mean) / std", "mean": given.mean.tolist(), "std": given.std.tolist()},
        "output": {"name": "logits", "shape": ["batch", len(model.class_names)]},
        "probabilities": f"softmax({model.logit_scale:g} * logits)",
        "class_names": list(model.class_names),
        "class_counts": model.class_counts,
        "loss": model.loss,
        "prior_power": model.prior_power,
        "prior": None
        if model.prior_power is None
        else "for another class prior q: add log q - prior_power * log(class_counts / sum) to the scores before softmax",
    }


def _program(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of models by import path: whatever torch cannot trace in them
        raise ValueError(f"the model cannot be exported: {str(error).strip().splitlines()[0][:300]}") from error


def _pt2(module: nn.Module, example: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(module, example), buffer)
    return buffer.getvalue()


def _onnx(module: nn.Module, example: Tensor) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("an .onnx file needs two packages: pip install onnx onnxscript") from error
    program = torch.onnx.export(
        _program(module, example), dynamo=True, input_names=["samples"], output_names=["logits"], verbose=False
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _pt(module: nn.Module, _: Tensor) -> bytes:
    return dump(module.state_dict())


def _safetensors(module: nn.Module, _: Tensor) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("a .safetensors file needs the package: pip install safetensors") from error
    content: bytes = save({name: value.contiguous() for name, value in module.state_dict().items()})
    return content


_WRITERS = {".pt2": _pt2, ".onnx": _onnx, ".pt": _pt, ".safetensors": _safetensors}
