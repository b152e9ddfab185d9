"""Attention, written out in the ways that models write it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

HEADS, WIDTH = 4, 16
LOWS: Final = {"inf": -np.inf, "min": float(np.finfo(np.float32).min), "1e9": -1e9}
SCALES: Final = ("mul", "div", "left", "q", "q-div", "k", "both", "none")
MASKINGS: Final = ("keep", "drop", "add", "add-left", "product")
REPEATS: Final = ("expand", "broadcast")


@dataclass(frozen=True)
class Spelling:
    """One way to write attention out.

    Args:
        groups: Key and value heads; repeated for the queries where fewer than those.
        repeat: How they are repeated: ``"expand"``, or left to MatMul (one group alone).
        scale: Where the factor stands; ``"none"`` is no factor.
        softcap: Whether the scores are capped.
        causal: Whether a key must not be later than its query.
        window: How many keys a query sees at most; 0 is all.
        padding: Whether ``attention_mask`` takes part.
        masking: How what is not seen is masked.
        low: With which number, a key of ``LOWS``.
        guard: Whether NaN after the softmax becomes 0.
        casts: Whether the softmax stands between casts.
        cached: Whether keys and values of the past come first.
        cross: Whether keys and values are of another sequence.
    """

    groups: int = 2
    repeat: str = "expand"
    scale: str = "mul"
    softcap: bool = False
    causal: bool = True
    window: int = 0
    padding: bool = True
    masking: str = "keep"
    low: str = "min"
    guard: bool = False
    casts: bool = False
    cached: bool = False
    cross: bool = False

    @property
    def masked(self) -> bool:
        """Whether there is a mask at all."""
        return self.causal or self.padding or self.window > 0


def text(of: Spelling) -> str:
    """Return the graph, in ONNX's text form."""
    body = [*_heads(of), *_product(of), *_masked(of), *_weights(of)]
    lines = "".join(f"   {line}\n" for line in body)
    return f"{_edge(of)}\n{{\n{lines}}}\n"


def _edge(of: Spelling) -> str:
    shared, tokens = of.groups * WIDTH, "X" if of.cross else "S"
    inputs = [f"float[B,S,{HEADS * WIDTH}] q", f"float[B,{tokens},{shared}] k"]
    inputs.append(f"float[B,{tokens},{shared}] v")
    outputs = [f"float[B,S,{HEADS * WIDTH}] y"]
    if of.masked:
        inputs.append(f"int64[B,{'T' if of.cached else 'S'}] attention_mask")
    if of.cached:
        past, present = (f"float[B,{of.groups},{n},{WIDTH}]" for n in "PT")
        inputs += [f"{past} past_key", f"{past} past_value"]
        outputs += [f"{present} present_key", f"{present} present_value"]
    low = "-inf" if of.low == "inf" else repr(LOWS[of.low])
    root = WIDTH**-0.25
    constants = (
        f"int64[4] qh = {{0,0,{HEADS},{WIDTH}}}, int64[4] kh = {{0,0,{of.groups},{WIDTH}}}, "
        f"int64[4] rep = {{0,{HEADS},-1,{WIDTH}}}, int64[3] flat = {{0,0,{HEADS * WIDTH}}}, "
        f"int64[5] five = {{1,1,{HEADS // of.groups},1,1}}, int64[1] two = {{2}}, "
        f"int64[2] one_two = {{1,2}}, int64 zero = {{0}}, int64 one = {{1}}, "
        f"int64[1] last = {{1}}, int64 w = {{{of.window}}}, float cap = {{5}}, "
        f"float s = {{{WIDTH**-0.5}}}, float d = {{{WIDTH**0.5}}}, float r = {{{root}}}, "
        f"float nought = {{0}}, float unit = {{1}}, float low = {{{low}}}"
    )
    return f"main ({', '.join(inputs)}) => ({', '.join(outputs)})\n<{constants}>"


def _heads(of: Spelling) -> list[str]:
    lines = []
    for name, sizes in (("q", "qh"), ("k", "kh"), ("v", "kh")):
        lines.append(f"{name}4 = Reshape ({name}, {sizes})")
        lines.append(f"{name}t = Transpose <perm = [0,2,1,3]> ({name}4)")
    keys, values = "kt", "vt"
    if of.cached:
        lines.append("present_key = Concat <axis = 2> (past_key, kt)")
        lines.append("present_value = Concat <axis = -2> (past_value, vt)")
        keys, values = "present_key", "present_value"
    if of.groups != HEADS and of.repeat == "expand":
        for name, value in (("kr", keys), ("vr", values)):
            lines.append(f"{name}5 = Unsqueeze ({value}, two)")
            lines.append(f"{name}e = Expand ({name}5, five)")
            lines.append(f"{name} = Reshape ({name}e, rep)")
        keys, values = "kr", "vr"
    return [*lines, f"keys = Identity ({keys})", f"values = Identity ({values})"]


def _product(of: Spelling) -> list[str]:
    before = {
        "q": ["qs = Mul (qt, s)", "ks = Identity (keys)"],
        "q-div": ["qs = Div (qt, d)", "ks = Identity (keys)"],
        "k": ["qs = Identity (qt)", "ks = Mul (keys, s)"],
        "both": ["qs = Mul (qt, r)", "ks = Mul (r, keys)"],
    }
    after = {
        "mul": "scaled = Mul (product, s)",
        "div": "scaled = Div (product, d)",
        "left": "scaled = Mul (s, product)",
    }
    lines = before.get(of.scale, ["qs = Identity (qt)", "ks = Identity (keys)"])
    lines = [*lines, "kT = Transpose <perm = [0,1,3,2]> (ks)", "product = MatMul (qs, kT)"]
    lines.append(after.get(of.scale, "scaled = Identity (product)"))
    if not of.softcap:
        return [*lines, "scores = Identity (scaled)"]
    return [*lines, "c1 = Div (scaled, cap)", "c2 = Tanh (c1)", "scores = Mul (c2, cap)"]


def _masked(of: Spelling) -> list[str]:
    if not of.masked:
        return ["masked = Identity (scores)"]
    lines = [
        "total1 = Shape <start = 1, end = 2> (attention_mask)",
        "total = Squeeze (total1)",
        "new1 = Shape <start = 1, end = 2> (q)",
        "new = Squeeze (new1)",
        "before = Sub (total, new)",
        "places = Range (zero, new, one)",
        "query = Add (places, before)",
        "query2 = Unsqueeze (query, last)",
        "key = Range (zero, total, one)",
    ]
    seen = []
    if of.causal:
        seen.append(("causal", ["causal = LessOrEqual (key, query2)"]))
    if of.window:
        seen.append(("near", ["first = Sub (query2, w)", "near = Greater (key, first)"]))
    if of.padding:
        made = ["real2 = Cast <to = 9> (attention_mask)", "real = Unsqueeze (real2, one_two)"]
        seen.append(("real", made))
    mask = seen[0][0]
    for name, made in seen:
        lines += made
        if name != seen[0][0]:
            lines.append(f"{mask}_{name} = And ({mask}, {name})")
            mask = f"{mask}_{name}"
    return [*lines, f"seen = Identity ({mask})", *_mask_lines(of.masking)]


def _mask_lines(masking: str) -> list[str]:
    return {
        "keep": ["masked = Where (seen, scores, low)"],
        "drop": ["unseen = Not (seen)", "masked = Where (unseen, low, scores)"],
        "add": ["bias = Where (seen, nought, low)", "masked = Add (scores, bias)"],
        "add-left": ["bias = Where (seen, nought, low)", "masked = Add (bias, scores)"],
        "product": [
            "seen1 = Cast <to = 1> (seen)",
            "unseen1 = Sub (unit, seen1)",
            "bias = Mul (unseen1, low)",
            "masked = Add (scores, bias)",
        ],
    }[masking]


def _weights(of: Spelling) -> list[str]:
    lines = ["raw = Softmax <axis = -1> (masked)", "weights = Identity (raw)"]
    if of.casts:
        lines = [
            "wide = Cast <to = 1> (masked)",
            "soft = Softmax <axis = 3> (wide)",
            "weights = Cast <to = 1> (soft)",
        ]
    if of.guard:
        lines += ["nan = IsNaN (weights)", "guarded = Where (nan, nought, weights)"]
    mixed = f"mixed = MatMul ({'guarded' if of.guard else 'weights'}, values)"
    return [
        *lines,
        mixed,
        "back = Transpose <perm = [0,2,1,3]> (mixed)",
        "y = Reshape (back, flat)",
    ]


def random_spelling(seed: int) -> Spelling:
    """Return a spelling drawn at random; every combination that means something can come."""
    rng = np.random.default_rng(seed)

    def flip() -> bool:
        return bool(rng.integers(2))

    cached = flip()
    spelling = Spelling(
        groups=int(rng.choice([1, 2, HEADS])),
        scale=str(rng.choice(SCALES)),
        softcap=flip(),
        causal=cached or flip(),
        window=int(rng.choice([0, 0, 3, 9])),
        padding=flip(),
        masking=str(rng.choice(MASKINGS)),
        low=str(rng.choice(list(LOWS))),
        guard=flip(),
        casts=flip(),
        cached=cached,
    )
    if spelling.groups == 1:
        spelling = replace(spelling, repeat=str(rng.choice(REPEATS)))
    if spelling.masking == "product" and spelling.low == "inf":
        spelling = replace(spelling, low="1e9")  # 0 times infinity is no number
    if not spelling.cached and not spelling.masked and flip():
        spelling = replace(spelling, cross=True)
    return spelling
