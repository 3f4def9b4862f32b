"""The closed vocabulary of portable programs: which ops a program file may call.

A program is data from a stranger, so the rule is a list and not a property: optc's own ops, the ATen ops that PyTorch
itself tags as core or pointwise, and the composite ones that capture leaves whole, named below. Among the rest of ATen
are ops that trust their arguments (sparse tensors made without a check) or reach outside them (files, the console).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "size.add": operator.add,
    "size.sub": operator.sub,
    "size.mul": operator.mul,
    "size.floordiv": operator.floordiv,
    "size.mod": operator.mod,
    "size.neg": operator.neg,
    "size.eq": operator.eq,
    "size.ne": operator.ne,
    "size.lt": operator.lt,
    "size.le": operator.le,
    "size.gt": operator.gt,
    "size.ge": operator.ge,
    "size.max": torch.sym_max,
    "size.min": torch.sym_min,
    "size.int": torch.sym_int,
    "size.float": torch.sym_float,
    "size.ite": torch.sym_ite,
}

COMPOSITES = frozenset(
    {
        "_unsafe_view", "absolute", "adjoint", "arange", "argsort", "baddbmm", "broadcast_tensors", "celu", "chunk",
        "clip", "concat", "concatenate", "contiguous", "divide", "dropout", "einsum", "empty_like", "expand_as", "eye",
        "flatten", "floor_divide", "full_like", "glu", "group_norm", "hardtanh", "histc", "hstack", "index_add",
        "index_copy", "index_fill", "layer_norm", "lift_fresh_copy", "linalg_vector_norm", "linear", "linspace",
        "log_softmax", "logsumexp", "mT", "masked_fill", "matmul", "mish", "moveaxis", "movedim", "multiply", "narrow",
        "negative", "new_empty", "new_full", "new_ones", "new_zeros", "norm", "numpy_T", "one_hot", "ones", "ones_like",
        "outer", "polar", "ravel", "relu6", "repeat_interleave", "reshape", "rms_norm", "rsub",
        "scaled_dot_product_attention", "selu", "silu", "softmax", "softplus", "split", "square", "squeeze", "stack",
        "std", "subtract", "sum", "swapaxes", "t", "tile", "topk", "transpose", "tril", "triu", "true_divide",
        "type_as", "unbind", "unflatten", "var", "view_as", "view_as_complex", "view_as_real", "vstack", "where",
        "zeros", "zeros_like",
    }
)  # fmt: skip

# Tagged core, and yet: random numbers, and memory as it was found, seen through sizes and strides of the caller's choice.
_DENIED = frozenset({"as_strided", "empty", "empty_strided", "resize"})


def is_known_op(op: torch._ops.OpOverload) -> bool:
    """Whether a program may call `op`. It changes nothing but its result, and gives tensors or a size."""
    if op.namespace == "optc":
        return True
    schema = op._schema
    name = schema.name.split("::")[1]
    if op.namespace != "aten" or schema.is_mutable or not schema.returns or name in _DENIED:
        return False
    if name.startswith("sym_"):
        return True
    tags = op.tags
    listed = torch.Tag.core in tags or torch.Tag.pointwise in tags or name in COMPOSITES
    gives_tensors = all(str(value.type) in ("Tensor", "List[Tensor]") for value in schema.returns)
    return listed and gives_tensors and torch.Tag.nondeterministic_seeded not in tags
