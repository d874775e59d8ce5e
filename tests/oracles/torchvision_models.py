"""torchvision's own models on the CPU build of torch, whose wheel lacks the compiled operators that nobody here needs.

Import this before `torchvision`: it declares two operators and lets the others' registrations pass.
"""

import torch

_library = torch.library.Library("torchvision", "DEF")
_register_fake = torch.library.register_fake


def _pass_over(name, *args, **kwargs):
    if isinstance(name, str) and name.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(name, *args, **kwargs)


try:
    torch.ops.torchvision.nms  # noqa: B018 - there, where the operators are compiled
except AttributeError:
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.register_fake = _pass_over
    try:
        import torchvision
    finally:
        torch.library.register_fake = _register_fake
else:
    import torchvision

models = torchvision.models
