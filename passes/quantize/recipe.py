"""Which scheme each weight gets: rules by role, then by name pattern, then the default."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import UsageError
from ...runtime.manifest import Role
from ...runtime.record import Record
from ...runtime.scheme import GROUPS, QuantizationArgs, Scheme, find_scheme
from .roles import Candidate

KEEP = "none"
Rounding = Literal["rtn", "rtn-minmax", "hqq", "gptq"]
Transform = Literal["smoothquant", "awq"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
ROLES: tuple[Role, ...] = get_args(Role)
_FOR: dict[Transform, str] = {"smoothquant": "rounded activations", "awq": "integer weights"}

# In full precision unless a rule names them. Routers always are: a wrong expert costs more than their few bytes.
_KEPT_ROLES: tuple[Role, ...] = ("lm_head", "embedding", "medusa")


class Rule(Record):
    """A scheme for the weights of a role, or whose name matches a pattern (with * and ?), or both.

    Attributes:
        role: attention, mlp, lm_head, embedding or medusa.
        name: pattern of the checkpoint's names, with or without `.weight` at the end, such as `model.layers.0.*`.
        scheme: a name that `find_scheme` knows, or none for full precision.
        rounding: how codes are chosen; the recipe's if not given.
    """

    role: Role | None = None
    name: str | None = None
    scheme: str
    rounding: Rounding | None = None

    def matches(self, role: Role, name: str) -> bool:
        names = (name, name.removesuffix(".weight"))
        return self.role in (None, role) and (
            self.name is None or any(fnmatch.fnmatchcase(n, self.name) for n in names)
        )

    def describe(self) -> str:
        return " and ".join(
            f"{key} {value}" for key, value in (("role", self.role), ("name", self.name)) if value is not None
        )


class Recipe(Record):
    """What to quantize and how.

    Rules with a role come first (those that also have a name pattern before those that have not), then rules with a
    name pattern, then the default; among equals the first one counts.

    Attributes:
        default: scheme of attention and MLP layers that no rule matches; none keeps them.
        rounding: how codes are chosen where the rule does not say; by default gptq for codes of less than 8 bits if
            there is calibration data, else rtn. FP8 codes are always rounded to nearest.
        transforms: rewrites of the float weights before that, in this order.
        rules: see above.
        kv_cache: int8, fp8, or none for the model's dtype.
        adapt: where a scheme's group does not divide a layer's inputs, take the next smaller one that does; where a weight
            is both lm_head and embedding, do with it what is said of the head. If off, these are errors.
    """

    default: str = KEEP
    rounding: Rounding | None = None
    transforms: tuple[Transform, ...] = ()
    rules: tuple[Rule, ...] = ()
    kv_cache: Literal["int8", "fp8"] | None = None
    adapt: bool = False

    @property
    def uses_calibration(self) -> bool:
        """Whether any codes depend on activations."""
        of_linears = self._schemes(
            but_for="embedding"
        )  # one is looked up, never multiplied: there is no input to measure
        gptq = any(rounding_for(scheme, rounding) == "gptq" for scheme, rounding in of_linears)
        return gptq or self.requires_calibration is not None

    @property
    def requires_calibration(self) -> str | None:
        """What the recipe asks for by name that cannot be done without calibration data, if anything."""
        if self.transforms:
            return self.transforms[0]
        for scheme, rounding in self._schemes():
            if scheme.activation.endswith("static"):
                return "a static scale of activations"
            if rounding == "gptq" == rounding_for(scheme, rounding):
                return rounding
        return None

    def without_calibration(self) -> Recipe:
        """The same schemes with codes that need no data: what would be GPTQ by default is rounded to nearest."""
        assert self.requires_calibration is None
        return self.model_copy(update={"rounding": self.rounding or "rtn"})

    def scheme_names(self) -> list[str]:
        """Of the default and the rules, each once."""
        names = [self.default, *(rule.scheme for rule in self.rules)]
        return [name for name in dict.fromkeys(names) if name != KEEP]

    @property
    def quantizes_nothing(self) -> bool:
        return not self.scheme_names() and self.kv_cache is None

    def _schemes(self, but_for: Role | None = None) -> Iterator[tuple[Scheme, Rounding | None]]:
        rules = [rule for rule in self.rules if but_for is None or rule.role != but_for]
        for name, rounding in [(self.default, None), *((rule.scheme, rule.rounding) for rule in rules)]:
            if name != KEEP:
                yield find_scheme(name), rounding or self.rounding

    def check_names(self) -> None:
        """Raises UsageError: a scheme that does not exist or that its rounding is not for, a transform that no scheme is
        for, or a rule for routers.
        """
        for name in self.scheme_names():
            find_scheme(name)
        for scheme, rounding in self._schemes():
            if rounding == "hqq" == rounding_for(scheme, rounding) and scheme.weights.symmetric:
                raise UsageError(
                    "hqq fits zero points, and a symmetric scheme has none; take one of the -asym schemes, or rtn"
                )
        for transform in self.transforms:
            if not any(gains(transform, scheme) for scheme, _ in self._schemes()):
                names = ", ".join(self.scheme_names()) or "the recipe"
                raise UsageError(f"{transform} is for {_FOR[transform]}, and {names} has none; leave {transform} out")
        for rule in self.rules:
            if rule.role == "router" and rule.scheme != KEEP:
                raise UsageError("a rule for the role router: routers stay in full precision; remove it")
            if rule.role is None and rule.name is None:
                raise UsageError("a rule with neither role nor name; give one, or set the recipe's default")


def gains(transform: Transform, scheme: Scheme) -> bool:
    """Whether a transform is for weights of this scheme."""
    match transform:
        case "smoothquant":
            return scheme.input_activations is not None
        case "awq":
            return scheme.weights.type == "int"


def rounding_for(scheme: Scheme, asked: Rounding | None) -> Rounding:
    """How the codes of a scheme are chosen, if that is what the recipe asks for."""
    if scheme.weights.type == "float":
        return "rtn-minmax" if asked == "rtn-minmax" else "rtn"
    return asked or ("gptq" if scheme.weights.num_bits < 8 else "rtn")


@dataclass(frozen=True)
class Assignment:
    """What one weight gets."""

    scheme_name: str
    scheme: Scheme
    rounding: Rounding | Literal["given"]  # by the checkpoint


def assign(recipe: Recipe, candidates: Sequence[Candidate], names: dict[str, str]) -> dict[str, Assignment]:
    """The scheme of each weight that gets one, by the weight's name in the program.

    Args:
        recipe: its names were checked.
        candidates: of the program.
        names: checkpoint name of each candidate, which the patterns are for.

    Raises:
        UsageError: a rule that matches nothing (lists near names) or only routers, a group size that does not divide, rules that
            disagree about a tied weight, or nothing to quantize.
    """
    for rule in recipe.rules:
        matched = {role for c in candidates for role in _roles(c) if rule.matches(role, names[c.name])}
        if not matched:
            raise UsageError(_matches_nothing(rule, candidates, names))
        if matched == {"router"} and rule.scheme != KEEP:
            raise UsageError(
                f"the recipe's rule for {rule.describe()} matches only routers, which stay in full precision; remove it"
            )
    found: dict[str, Assignment] = {}
    for candidate in candidates:
        if assignment := _assign(recipe, candidate, names[candidate.name]):
            found[candidate.name] = assignment
    if not found and recipe.default != KEEP:
        present = ", ".join(sorted({role for candidate in candidates for role in _roles(candidate)})) or "no"
        raise UsageError(
            f"{recipe.default} is for the attention and MLP layers, and there are none to quantize: the model has weights "
            f"of the roles {present}; name those in a recipe, or leave quantization out"
        )
    return found


def _roles(candidate: Candidate) -> tuple[Role, ...]:
    return ("lm_head", "embedding") if candidate.is_tied else (candidate.role,)


def _assign(recipe: Recipe, candidate: Candidate, name: str) -> Assignment | None:
    chosen = {role: _choose(recipe, role, name) for role in _roles(candidate)}
    if recipe.adapt and candidate.is_tied:
        del chosen["embedding"]
    schemes = {rule.scheme for rule in chosen.values()}
    if len(schemes) > 1:
        raise UsageError(
            f"{name} is both lm_head and embedding (tied), stored once, and the recipe gives it "
            f"{' and '.join(f'{rule.scheme} as {role}' for role, rule in chosen.items())}; give both roles the same scheme"
        )
    rule = next(iter(chosen.values()))
    if rule.scheme == KEEP or candidate.role == "router":
        return None
    scheme_name, scheme = _fit(rule.scheme, candidate, name, adapt=recipe.adapt)
    rounding = rounding_for(scheme, rule.rounding or recipe.rounding)
    if not candidate.linears and rounding == "gptq":
        rounding = "rtn"  # an embedding is looked up, never multiplied: there is no input to measure
    return Assignment(scheme_name, scheme, rounding)


def _choose(recipe: Recipe, role: Role, name: str) -> Rule:
    matching = [rule for rule in recipe.rules if rule.matches(role, name)]
    order = sorted(matching, key=lambda rule: (rule.role is None, rule.name is None))
    kept = Rule(role=role, scheme=KEEP if role in _KEPT_ROLES else recipe.default)
    return order[0] if order else kept


def _fit(name: str, candidate: Candidate, weight: str, *, adapt: bool) -> tuple[str, Scheme]:
    scheme = find_scheme(name)
    group, columns = scheme.weights.group_size, candidate.shape[1]
    if scheme.weights.strategy != "group" or group is None or columns % group == 0:
        return name, scheme
    fitting = [size for size in GROUPS if columns % size == 0]
    if not adapt:
        offers = ", ".join(f"g{size}" for size in fitting) or "channel (one group a row)"
        raise UsageError(
            f"{weight} has {columns} inputs, which groups of {group} ({name}) do not divide; of the group sizes fit: {offers}"
        )
    smaller = [size for size in fitting if size < group]
    replaced = f"g{smaller[-1]}" if smaller else "channel"
    adapted = "w8a16" if name.startswith("w8a16") and not smaller else name.replace(f"-g{group}", f"-{replaced}")
    return adapted, find_scheme(adapted)


def _matches_nothing(rule: Rule, candidates: Sequence[Candidate], names: dict[str, str]) -> str:
    if rule.name is None:
        present = ", ".join(sorted({role for candidate in candidates for role in _roles(candidate)}))
        return (
            f"the recipe's rule for {rule.describe()} matches nothing: the model has weights of the roles {present}; remove "
            "the rule"
        )
    of_role = [c for c in candidates if rule.role is None or rule.role in _roles(c)]
    near = near_names(rule.name, [names[candidate.name] for candidate in of_role or candidates])
    return f"the recipe's rule for {rule.describe()} matches no weight; names like it: {', '.join(near)}"


def near_names(pattern: str, known: Sequence[str], count: int = 3) -> list[str]:
    """The names most like a pattern, with * in place of the numbers of layers.

    What the pattern says literally is compared with every run of a name's parts, so that `*.qproj.*` finds q_proj.
    """
    literal = re.sub(r"[*?]|\[.*?\]", "", re.sub(r"\.(\d+|\*)(?=\.)", "", pattern)).strip(".").replace("..", ".")
    collapsed = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in known)

    def likeness(name: str) -> float:
        parts = [part for part in name.split(".") if part != "*"]
        runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return max(difflib.SequenceMatcher(None, literal, run).ratio() for run in runs)

    return sorted(collapsed, key=likeness, reverse=True)[:count]


def activation_args(kind: Literal["int8", "fp8"]) -> QuantizationArgs:
    """The KV cache's scheme: 8 bits, one scale for each token, head and of key and value, computed as it is written."""
    return QuantizationArgs(type="int" if kind == "int8" else "float", strategy="token", dynamic=True)
