"""Sampling the next token of each sequence, as one Triton kernel.

`engine.sampler.BatchSampler` has the same in plain torch. One program samples for one row of logits. top_k and top_p
are applied without sorting: the bits of the scores, mapped to ordered integers, are searched for the lowest score that
stays, two bits in each pass. Scores close to the best one are copied first, and nearly always the search and the
sampling read only these. Sums are added in the same order for any batch.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import launch_options, wait_for_inputs

_TILE = 8192
"""Tokens that a program reads at once."""

_ROOM = 2 * _TILE
"""Most tokens near the best one that are copied."""

_TILE_OF_A_WARP = 512

PARAMETERS = tl.constexpr(7)

DISTANCE = tl.constexpr(8.0)
"""Largest distance from the best score of the tokens that are copied, in nats; the first one tried."""

ALL = tl.constexpr(128.0)
"""Distance from the best score at which a probability is 0 in float32."""

TRIES = tl.constexpr(8)
"""Most distances tried, if one gives too few or too many tokens."""


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    uniforms: torch.Tensor,
    may_not_end: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    parameters: torch.Tensor,
    end_ids: torch.Tensor,
    seen: torch.Tensor | None,
    last_ids: torch.Tensor,
    blocks: bool,
    samples: bool,
    sorts: bool,
) -> torch.Tensor:
    """Sample a token for each row, and store it as the row's last one, as `engine.sampler.BatchSampler`.

    Args:
        logits: Of shape `(rows, vocab)`, floating, contiguous within a row; not changed.
        slots: Index of each row in the tables below, of shape `(rows,)`, int32 or int64.
        uniforms: A number in [0, 1) for each row, of shape `(rows,)`, float32.
        may_not_end: Whether a row's end tokens are excluded, of shape `(rows,)`, bool or int32.
        mask: Allowed tokens as bits, lowest first, of shape `(rows, ceil(vocab / 32))`, int32; None allows all.
        parameters: For each slot temperature, top_k (the size of the vocabulary for none), top_p, min_p, repetition
            penalty, whether the row samples at random, and whether it has end tokens, of shape `(slots, 7)`, float32,
            contiguous.
        end_ids: End tokens of each slot, of shape `(slots, width)`, int64.
        seen: The tokens of a slot's text, of shape `(slots, vocab)`, bool; None if no row has a penalty. The sampled
            token is added.
        last_ids: Receives the sampled token of each slot, of shape `(slots,)`, int64.
        blocks: Whether any row's end tokens may be excluded. Compiled in, as are the next two.
        samples: Whether any row samples at random.
        sorts: Whether any row has a top_k or top_p.

    Returns:
        Token ids of shape `(rows,)`, int32; -1 if a logit was NaN, -2 if no token was allowed.
    """
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return out
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tile = min(_TILE, triton.next_power_of_2(vocab_size))
    room = _ROOM if sorts else 0
    # The scores of a row, followed by the copied ones.
    scores = torch.empty(rows if samples else 0, vocab_size + room, dtype=torch.float32, device=logits.device)
    near_ids = torch.empty(rows if sorts else 0, room, dtype=torch.int32, device=logits.device)
    _sample_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        slots,
        uniforms,
        may_not_end,
        mask,
        0 if mask is None else mask.stride(0),
        parameters,
        end_ids,
        seen,
        last_ids,
        out,
        scores,
        near_ids,
        blocks=blocks,
        penalizes=seen is not None,
        masks=mask is not None,
        samples=samples,
        sorts=sorts,
        end_width=end_ids.shape[1],
        room=room,
        tile=tile,
        num_warps=max(1, min(16, tile // _TILE_OF_A_WARP)),
        **launch_options(logits.device),
    )
    return out


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _key(score):  # type: ignore[no-untyped-def]
    """Map float32 to uint32 in the same order."""
    bits = score.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(score < 0, 0xFFFFFFFF, 0x80000000)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _weight(score, best):  # type: ignore[no-untyped-def]
    """Return the probability relative to the best token's, whose score may be infinite."""
    return tl.where(score == best, 1.0, tl.exp(score - best))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _weight_of(scores, count, best, floor, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the probabilities, relative to the best token's, of the tokens with keys of at least `floor`."""
    offsets = tl.arange(0, tile)
    weights = tl.zeros((tile,), tl.float32)
    for start in range(0, count, tile):
        inside = start + offsets < count
        score = tl.load(scores + start + offsets, mask=inside, other=-float("inf"))
        weights += tl.where(inside & (_key(score) >= floor), _weight(score, best), 0.0)
    return tl.sum(weights)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _least_key(scores, count, best, floor, bound, weighs: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find the lowest key such that the weights of the keys above it, from `floor` on, sum to less than a bound.

    Each pass finds two bits, by comparing the sums above three candidates with the bound.
    """
    offsets = tl.arange(0, tile)
    least = tl.full((), 0, tl.uint32)
    one = tl.full((), 1, tl.uint32)
    shift = tl.full((), 30, tl.uint32)
    for _ in range(16):
        first = least + ((one << shift) - 1)
        second = first + (one << shift)
        third = second + (one << shift)
        above_first = tl.zeros((tile,), tl.float32)
        above_second = tl.zeros((tile,), tl.float32)
        above_third = tl.zeros((tile,), tl.float32)
        for start in range(0, count, tile):
            score = tl.load(scores + start + offsets, mask=start + offsets < count, other=-float("inf"))
            key = _key(score)
            counted = (start + offsets < count) & (key >= floor)
            weight = tl.where(counted, _weight(score, best) if weighs else 1.0, 0.0)
            above_first += tl.where(key > first, weight, 0.0)
            above_second += tl.where(key > second, weight, 0.0)
            above_third += tl.where(key > third, weight, 0.0)
        if tl.sum(above_first) >= bound:
            if tl.sum(above_second) >= bound:
                if tl.sum(above_third) >= bound:
                    least += one << shift
                least += one << shift
            least += one << shift
        shift -= 2
    return least


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _place_of(scores, count, best, floor, uniform, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample by inverse CDF: find the first index up to which the probabilities exceed a share of their sum."""
    offsets = tl.arange(0, tile)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, count, tile):
        score = tl.load(scores + start + offsets, mask=start + offsets < count, other=-float("inf"))
        kept = (start + offsets < count) & (_key(score) >= floor)
        total += tl.sum(tl.where(kept, _weight(score, best), 0.0).to(tl.float64))
    aim = total * uniform.to(tl.float64)
    place = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    for start in range(0, count, tile):
        score = tl.load(scores + start + offsets, mask=start + offsets < count, other=-float("inf"))
        kept = (start + offsets < count) & (_key(score) >= floor)
        weight = tl.where(kept, _weight(score, best), 0.0).to(tl.float64)
        after = before + tl.sum(weight)
        if (before <= aim) & (after > aim):
            reached = (before + tl.cumsum(weight, 0) > aim) & (weight > 0)
            last = tl.max(tl.where(weight > 0, offsets, 0))  # if sums in another order are lower
            place = start + tl.minimum(tl.min(tl.where(reached, offsets, tile)), last)
        before = after
    return place


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    vocab_size,
    slots,
    uniforms,
    may_not_end,
    mask,
    mask_stride,
    parameters,
    end_ids,
    seen,
    last_ids,
    out,
    all_scores,
    near_ids,
    blocks: tl.constexpr,
    penalizes: tl.constexpr,
    masks: tl.constexpr,
    samples: tl.constexpr,
    sorts: tl.constexpr,
    end_width: tl.constexpr,
    room: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
):
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    offsets = tl.arange(0, tile)
    logits += row * row_stride
    all_scores += row * (vocab_size + room)
    parameters += slot * PARAMETERS
    temperature = tl.load(parameters)
    is_blocked = False
    if blocks:
        is_blocked = (tl.load(may_not_end + row) != 0) & (tl.load(parameters + 6) != 0)

    # Compute the scores, the best one, and whether any is NaN.
    highest = tl.full((tile,), -float("inf"), tl.float32)
    highest_at = tl.zeros((tile,), tl.int32)
    broken = tl.zeros((tile,), tl.int32)
    for start in range(0, vocab_size, tile):
        tokens = start + offsets
        inside = tokens < vocab_size
        score = tl.load(logits + tokens, mask=inside, other=-float("inf")).to(tl.float32)
        broken |= (score != score).to(tl.int32)
        if penalizes:
            penalty = tl.load(parameters + 4)
            was_seen = tl.load(seen + slot * vocab_size + tokens, mask=inside, other=0) != 0
            penalized = tl.where(score < 0, score * penalty, tl.div_rn(score, penalty))
            score = tl.where(was_seen, penalized, score)
        if is_blocked:
            for i in range(end_width):
                score = tl.where(tokens == tl.load(end_ids + slot * end_width + i), -float("inf"), score)
        if masks:
            words = tl.load(mask + row * mask_stride + tokens // 32, mask=inside, other=0)
            score = tl.where(((words >> (tokens % 32)) & 1) != 0, score, -float("inf"))
        is_higher = score > highest
        highest = tl.where(is_higher, score, highest)
        highest_at = tl.where(is_higher, tokens, highest_at)
        if samples:
            # Adding 0 turns -0 into 0, whose bits differ.
            tl.store(all_scores + tokens, tl.div_rn(score, temperature) + 0.0, mask=inside)
    best = tl.max(highest)
    token = tl.min(tl.where(highest == best, highest_at, vocab_size - 1))
    is_broken = tl.max(broken) != 0

    if samples:
        tl.debug_barrier()  # scores are read by other threads than wrote them
        if (tl.load(parameters + 5) != 0) & (best > -float("inf")):
            scores, count = all_scores, vocab_size
            best_score = tl.div_rn(best, temperature)
            min_p = tl.load(parameters + 3)
            # The best score may be infinite, and so is the logarithm of 0: their sum would be NaN.
            by_min_p = tl.where(min_p > 0, best_score + tl.log(min_p), -float("inf"))
            floor = tl.full((), 0, tl.uint32)
            is_near = best == -float("inf")  # which is never true here
            if sorts:
                k = tl.load(parameters + 1).to(tl.int32)
                p = tl.load(parameters + 2)
                has_k = k < vocab_size
                total = tl.full((), 0.0, tl.float32)
                if (p < 1.0) & (k >= vocab_size):
                    total = _weight_of(scores, vocab_size, best_score, floor, tile)
                # Find a distance from the best score that includes all tokens that may be sampled, and not too many.
                distance, nearer, farther = tl.full((), DISTANCE, tl.float32), 0.0, float("inf")
                found = tl.full((), 0, tl.int32)
                for _ in range(TRIES):
                    if (not is_near) & (has_k | (p < 1.0) | (by_min_p > -float("inf"))):
                        counts = tl.zeros((tile,), tl.int32)
                        weights = tl.zeros((tile,), tl.float32)
                        for start in range(0, vocab_size, tile):
                            inside = start + offsets < vocab_size
                            score = tl.load(scores + start + offsets, mask=inside, other=-float("inf"))
                            near = inside & (score >= best_score - distance)
                            counts += near.to(tl.int32)
                            if not has_k:
                                weights += tl.where(near, _weight(score, best_score), 0.0)
                        found = tl.sum(counts)
                        suffices = (has_k & (found >= k)) | (by_min_p >= best_score - distance) | (distance >= ALL)
                        suffices = suffices | ((not has_k) & (p < 1.0) & (tl.sum(weights) >= p * total))
                        is_near = suffices & (found <= room)
                        if not is_near:
                            farther = tl.where(suffices, distance, farther)
                            nearer = tl.where(suffices, nearer, distance)
                            distance = tl.where(farther == float("inf"), 2 * distance, 0.5 * (nearer + farther))
                if is_near:  # copy them, in order
                    scores, count = all_scores + vocab_size, found
                    found = 0
                    for start in range(0, vocab_size, tile):
                        tokens = start + offsets
                        score = tl.load(all_scores + tokens, mask=tokens < vocab_size, other=-float("inf"))
                        keeps = (tokens < vocab_size) & (score >= best_score - distance)
                        places = found + tl.cumsum(keeps.to(tl.int32), 0) - 1
                        tl.store(scores + places, score, mask=keeps)
                        tl.store(near_ids + row * room + places, tokens, mask=keeps)
                        found += tl.sum(keeps.to(tl.int32))
                    tl.debug_barrier()
                if has_k & (k < count):
                    floor = _least_key(scores, count, best_score, floor, k.to(tl.float32), False, tile)
                if p < 1.0:
                    if has_k:
                        total = _weight_of(scores, count, best_score, floor, tile)
                    by_p = _least_key(scores, count, best_score, floor, p * total, True, tile)
                    floor = tl.maximum(floor, by_p)
            floor = tl.maximum(floor, _key(by_min_p))
            token = _place_of(scores, count, best_score, floor, tl.load(uniforms + row), tile)
            if sorts:  # noqa: SIM102  (a constant of the compiler, unlike `is_near`)
                if is_near:
                    token = tl.load(near_ids + row * room + token)

    tl.store(last_ids + slot, token.to(tl.int64))
    if penalizes:
        tl.store(seen + slot * vocab_size + token, 1)
    result = tl.where(best == -float("inf"), -2, token)
    tl.store(out + row, tl.where(is_broken, -1, result).to(tl.int32))
