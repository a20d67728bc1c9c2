"""The scheduler: which sequences prefill, decode or wait in the next step.

Owns the waiting and the running sequences, their blocks, and who goes first. Counts tokens only: it reads no tensors
and no text. Sequences are ordered by priority, then by arrival; "older" below means earlier in that order.

Every step decodes all sequences that can, and spends the rest of its tokens on prompts. What is promised:

- The oldest prompt gets at least half of the tokens that a step has for prompts, so shorter ones never starve it.
- The other half goes to prompts with fewer tokens left, the shortest first, so a short prompt waits for shorter ones
  only, not for a long one.
- A sequence that has to wait for room is passed by others that fit, for `PASSED_STEPS` steps at most. Then none behind
  it joins before it has.
- An older sequence that needs a block takes it from the youngest, which is computed again later.
- A sequence whose text is not read (see `ChunkStream.is_full`) rests; others may take its slot, its blocks and its
  place within its owner's limit. It holds up no other one, wherever it waits.
- Of an owner with a limit, the oldest waiting sequences are considered, as many as its limit leaves places; one without
  room is passed here, too.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import insort
from collections import Counter, abc, deque
from dataclasses import replace
from types import MappingProxyType

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.sequence import Lane, Sequence
from langchain_quantllm.engine.speculation.proposal import Proposal
from langchain_quantllm.engine.speculation.speculator import Speculator
from langchain_quantllm.engine.step import PrefillChunk, Step

PASSED_STEPS = 256
"""Most steps that a sequence which waits for room is passed by others."""

_LOOKED_AT = 64  # waiting sequences that a step considers
_REFUSED = 8  # of these, how many it finds no room for before it stops looking
_ROUNDS = 4  # divisions of a step's tokens among prompts
LEAST_DIVIDED = 24
"""Decoding sequences from which on they are divided into several steps, where these run at the same time."""

_PROMPT_SHARE = 4  # prompts get at least this part of a step's tokens, however many sequences decode


class Scheduler:
    """Plans one step after another."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        slots: int,
        step_tokens: int,
        step_tokens_while_decoding: int,
        cuts_prompts: bool = True,
        window: int = 0,
        speculator: Speculator | None = None,
    ) -> None:
        """Begin with no sequences.

        Args:
            blocks: The KV cache's blocks.
            slots: Maximum number of sequences at once.
            step_tokens: Most tokens of a step in which no sequence decodes.
            step_tokens_while_decoding: Most tokens of a step in which sequences decode, one token each. If they leave
                less than a quarter of it, prompts get that quarter all the same.
            cuts_prompts: Whether a prompt may run in several steps; else a step takes the whole of one that it would
                have begun, and has more tokens than these.
            window: The last positions that a token sees in any layer, its own included; 0 if it sees all.
            speculator: Chooses the proposals of steps that only decode; None for no proposals.
        """
        self.blocks = blocks
        self.running: list[Sequence] = []  # from old to young
        self.step_tokens = step_tokens
        self.step_tokens_while_decoding = step_tokens_while_decoding
        self.preempted = 0
        """Preemptions so far: a sequence gave up its blocks for another one."""
        self._cuts_prompts = cuts_prompts
        self._queues: dict[Lane, list[Sequence]] = {}  # of waiting sequences, from old to young
        self._window = window
        self._speculator = speculator
        self._total_slots = slots
        self._slots = list(range(slots - 1, -1, -1))
        self._arrivals = itertools.count()
        self._steps = 0
        # Of the step that is being planned:
        self._planned: set[Sequence] = set()
        self._unread: set[Sequence] = set()  # sequences that it leaves out, as their text is not read
        self._left_out: set[Sequence] = set()  # decoding sequences that run in another part
        self._awaited: set[Sequence] = set()  # of these, those that wait until their tokens are known
        self._recent: deque[list[Sequence]] = deque(maxlen=1)  # decoding sequences of the last steps
        self._resting: list[Sequence] = []  # of these, the running ones, from old to young
        self._refused: set[Sequence] = set()  # waiting sequences without room

    @property
    def waiting(self) -> list[Sequence]:
        """The waiting sequences, from old to young."""
        return list(heapq.merge(*self._queues.values(), key=age))

    @property
    def waiting_count(self) -> int:
        """How many sequences wait for a place, without those that rest. Any thread may ask."""
        return sum(not sequence.is_unread for queue in list(self._queues.values()) for sequence in list(queue))

    @property
    def free_slots(self) -> int:
        """How many more sequences could run, if there are blocks for them."""
        return len(self._slots)

    @property
    def has_unread(self) -> bool:
        """Whether the last plan left out sequences because their text is not read."""
        return bool(self._unread)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences, running and waiting."""
        return [*self.running, *itertools.chain.from_iterable(self._queues.values())]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        if self._speculator is not None:
            self._speculator.begin(sequence)
        sequence.arrival = next(self._arrivals)
        self._queue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended, running or waiting, and free its blocks."""
        if self._speculator is not None:
            self._speculator.end(sequence)
        if sequence.slot >= 0:
            self._leave(sequence)
        else:
            self._unqueue(sequence)

    def plan(self, *, mixes: bool = True, decodes_first: bool = False, parts: int = 1) -> Step | None:
        """Choose the next step; None if nothing can run before pending tokens are known or unread text is read.

        The step counts as run: its tokens count as written and sampled from now on.

        Args:
            mixes: Let a step decode and read prompts; else it reads prompts, or decodes if there are none.
            decodes_first: Of these two, decode if any sequence can.
            parts: How many steps run at the same time, in several stages: so many parts of the decoding sequences take
                turns, if there are `LEAST_DIVIDED` or more of them.
        """
        self._begin_step()
        self._begin_anew()
        self._choose_part(parts)
        step = self._plan(mixes=mixes, decodes_first=decodes_first)
        if step is None and self._left_out:  # none of this part can run
            self._left_out = set()
            step = self._plan(mixes=mixes, decodes_first=decodes_first)
        if parts > 1 and step is not None and step.decoding:
            self._recent.append(step.decoding)
        return step

    def _choose_part(self, parts: int) -> None:
        """Choose the decoding sequences of a step's turn: those that have not run in the last steps."""
        if parts == 1:
            return
        if self._recent.maxlen != parts - 1:
            self._recent = deque(self._recent, maxlen=parts - 1)
        decoding = [s for s in self.running if s.decodes and not s.is_complete and s not in self._resting]
        if len(decoding) < LEAST_DIVIDED:
            return
        recent = set(itertools.chain.from_iterable(self._recent))
        turn = [s for s in decoding if s not in recent] or decoding
        self._left_out = set(decoding).difference(turn[: -(-len(decoding) // parts)])

    def _plan(self, *, mixes: bool, decodes_first: bool) -> Step | None:
        step = Step([], [], [])
        if decodes_first and not mixes:
            self._plan_decoding(step)
            if step.decoding:
                return step
        if not self._queues and all(sequence.decodes for sequence in self.running):
            if not step.decoding:
                self._plan_decoding(step)
            return step if step.decoding else None
        budget = self.step_tokens
        decoding = sum(s.decodes and not s.is_complete and s not in self._resting for s in self.running)
        if decoding and mixes:
            most = self.step_tokens_while_decoding
            budget = max(most - decoding, most // _PROMPT_SHARE, 1)
        for _ in range(_ROUNDS):  # prompts that find blocks to share leave some of their tokens to others
            chunks = len(step.chunks)
            self._refused.clear()
            self._plan_running(self._grant(budget), step, decodes=mixes)
            budget -= sum(chunk.count for chunk in step.chunks[chunks:])
            if budget <= 0 or len(step.chunks) == chunks:
                break
        if not step.chunks and not mixes:
            self._plan_decoding(step)
        return step if step.decoding or step.chunks else None

    def _plan_decoding(self, step: Step) -> None:
        """Plan a step that only decodes, with proposals."""
        proposals: dict[Sequence, Proposal] = {}
        if self._speculator is not None and any(s.speculation is not None for s in self.running):
            rows = [s for s in self.running if s.decodes and not s.is_complete and not s.is_outgrown]
            self._awaited = {s for s in rows if self._speculator.awaits(s)}
            rows = [s for s in rows if s not in self._awaited]
            proposals = self._speculator.choose([s for s in rows if s not in self._resting and self._may_go_on(s)])
        self._plan_running({}, step, proposals=proposals)

    def _may_go_on(self, sequence: Sequence) -> bool:
        """Whether a sequence may decode before the result of its proposals in flight is known."""
        if not sequence.in_flight:
            return True
        return self._speculator is not None and self._speculator.follows and sequence.most_proposed >= 0

    def plan_beside(self, running: Step) -> Step | None:
        """Plan a step that only decodes, to be run in the middle of a step of prompts, whose sequences it leaves alone.

        Returns:
            The step; None if no other sequence can decode.
        """
        self._begin_step()
        self._planned.update(chunk.sequence for chunk in running.chunks)
        step = Step([], [], [])
        self._plan_running({}, step)
        return step if step.decoding else None

    def _begin_step(self) -> None:
        self._steps += 1
        self._planned.clear()
        self._left_out = set()
        self._awaited = set()
        self._resting = [sequence for sequence in self.running if sequence.is_unread]
        self._unread = set(self._resting)

    def _begin_anew(self) -> None:
        """Let sequences whose keys and values become others give up their blocks, and wait to be computed again."""
        for sequence in [sequence for sequence in self.running if sequence.is_outgrown]:
            sequence.begin_anew()
            if sequence in self._resting:
                self._resting.remove(sequence)
            self._leave(sequence)
            self._queue(sequence)

    def resolve(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """Note how many of a sequence's tokens in flight are right, before they are pushed."""
        sequence.sampled += accepted
        if sequence.slot >= 0:  # else it was preempted meanwhile
            sequence.written += accepted
            sequence.in_flight -= proposed

    def push(self, sequence: Sequence, token_id: int) -> None:
        """Append a sampled token that the device has returned."""
        sequence.ids.append(token_id)
        if sequence.slot >= 0:
            sequence.register(self.blocks)

    def check_integrity(self) -> None:
        """Check that slots, blocks and sequences account for each other.

        Raises:
            RuntimeError: If they do not; the message says what is wrong.
        """
        self.blocks.check_integrity()
        held = Counter(block for sequence in self.running for block in sequence.blocks if block)
        slots = [sequence.slot for sequence in self.running] + self._slots
        faults = {
            "a slot is lost or used twice": sorted(slots) != list(range(self._total_slots)),
            "a block is held by no sequence": len(held) != self.blocks.held,
            "a waiting sequence holds a slot or blocks": any(s.slot >= 0 or s.blocks for s in self.waiting),
            "running sequences are out of order": self.running != sorted(self.running, key=age),
        }
        for fault, is_there in faults.items():
            if is_there:
                raise RuntimeError(fault)

    # The division of a step's tokens.

    def _grant(self, budget: int) -> dict[Sequence, int]:
        """Divide tokens among prompts that run or can join now, and let the latter join."""
        while True:
            granted = _divide(budget, self._candidates())
            if not self._cuts_prompts:
                granted = {sequence: len(sequence.ids) - sequence.written for sequence in granted}
            refused = [sequence for sequence in granted if sequence.slot < 0 and not self._admit(sequence)]
            if not refused:
                return granted
            self._refused.update(refused)
            for sequence in refused:
                if self._slots and sequence.blocked_since is None:
                    sequence.blocked_since = self._steps

    def _candidates(self) -> list[Sequence]:
        """List the sequences that a chunk can be planned for, from old to young."""
        running = [s for s in self.running if not s.decodes and s not in self._planned and s not in self._resting]
        if len(self._refused) >= _REFUSED:
            return running
        rows = Counter(sequence.lane for sequence in self.running if sequence not in self._resting)
        queues = [self._considered(queue, lane, rows[lane]) for lane, queue in self._queues.items()]
        joining = []
        for sequence in itertools.islice(heapq.merge(*queues, key=age), _LOOKED_AT):
            if sequence not in self._refused:
                joining.append(sequence)
            if sequence.blocked_since is not None and self._steps - sequence.blocked_since >= PASSED_STEPS:
                break  # it has been passed long enough
        return sorted(running + joining, key=age)

    def _considered(self, queue: abc.Iterable[Sequence], lane: Lane, rows: int) -> abc.Iterator[Sequence]:
        """Iterate over the waiting sequences of a lane that could run, of which `rows` run: as many as have a place."""
        for sequence in queue:
            if lane.most is not None and rows >= lane.most:
                return
            if sequence.is_unread:
                self._unread.add(sequence)  # for the whole step, whatever its reader does meanwhile
            if sequence.is_known and sequence not in self._unread:
                yield sequence
                rows += sequence not in self._refused

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence join if there are a slot and blocks for its tokens."""
        if not self._has_room(sequence, beside=self._resting):
            return False
        lane = sequence.lane
        if lane.most is not None and sum(other.lane == lane for other in self.running) >= lane.most:
            self._preempt(next(other for other in reversed(self._resting) if other.lane == lane))
        while not self._has_room(sequence):
            if not self._resting:
                return False
            self._preempt(self._resting[-1])
        self._unqueue(sequence)
        sequence.slot = self._slots.pop()
        sequence.blocked_since = None
        insort(self.running, sequence, key=age)
        sequence.share(self.blocks)
        return True

    def _has_room(self, sequence: Sequence, beside: abc.Sequence[Sequence] = ()) -> bool:
        """Whether a waiting sequence finds a slot and blocks, if the sequences `beside` it give up theirs."""
        if not self._slots and not beside:
            return False
        if len(self.running) == len(beside):
            return True
        _, held = sequence.find_shared(self.blocks)
        # Prompts that run already get their blocks first. And each running sequence soon needs one more: without this
        # margin the newcomer would be preempted at once. Resting sequences get theirs when they are read.
        active = [other for other in self.running if other not in self._resting]
        promised = sum(_missing_blocks(other) for other in active if not other.decodes)
        needed = _missing_blocks(sequence) - held + promised + len(active)
        freed = {block for other in beside for block in other.blocks if block}
        if freed:
            freed.difference_update(block for other in active for block in other.blocks)
        return needed <= self.blocks.available + len(freed)

    # The step.

    def _plan_running(
        self,
        granted: abc.Mapping[Sequence, int],
        step: Step,
        *,
        decodes: bool = True,
        proposals: abc.Mapping[Sequence, Proposal] = MappingProxyType({}),
    ) -> None:
        """Plan decoding sequences and granted chunks, from old to young: the young give way."""
        for sequence in list(self.running):
            if sequence.slot < 0 or sequence in self._planned or sequence in self._resting:
                continue
            if not sequence.decodes:
                if sequence in granted and (chunk := self._plan_chunk(sequence, granted[sequence])):
                    step.chunks.append(chunk)
                    self._planned.add(sequence)
            elif (
                sequence.is_complete
                or sequence.is_outgrown
                or sequence in self._left_out
                or sequence in self._awaited
                or (sequence.in_flight and sequence not in proposals)
            ):
                continue
            elif decodes and self._reserve(sequence, sequence.written + sequence.in_flight + 1):
                if sequence in proposals:
                    self._plan_proposal(sequence, proposals[sequence], step)
                step.decoding.append(sequence)
                step.positions.append(sequence.written)
                sequence.written += 1
                sequence.sampled += 1
                sequence.register(self.blocks)
                self._planned.add(sequence)

    def _plan_proposal(self, sequence: Sequence, proposal: Proposal, step: Step) -> None:
        """Verify as many proposed tokens as there are blocks for, without any that others could need."""
        least = sequence.written + sequence.in_flight + 1
        free = len(sequence.blocks) * BLOCK_TOKENS - least
        if free < proposal.count and self.blocks.available > len(self.running):
            more = min(-(-(proposal.count - free) // BLOCK_TOKENS), self.blocks.available - len(self.running))
            sequence.blocks += [block for _ in range(more) if (block := self.blocks.take()) is not None]
            free += more * BLOCK_TOKENS
        proposal = replace(proposal, count=min(proposal.count, free))
        if proposal.count or sequence.in_flight:
            step.proposals[sequence] = proposal
            sequence.in_flight += proposal.count

    def _plan_chunk(self, sequence: Sequence, tokens: int) -> PrefillChunk | None:
        before = sequence.written
        sequence.share(self.blocks)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.written
        elif before and sequence.sampled == 0:  # another sequence has written these tokens meanwhile
            sequence.cached_tokens += sequence.written - before
        start = sequence.written
        end = sequence.chunk_end(start, min(start + tokens, len(sequence.ids)))
        if not self._reserve(sequence, end):
            return None
        sequence.written = end
        is_last = end == len(sequence.ids)
        if is_last:
            sequence.decodes = True
            sequence.sampled += 1
        sequence.register(self.blocks)
        restored, saves = sequence.take_states(self.blocks)
        return PrefillChunk(sequence, start, end - start, is_last, restored, saves)

    # Blocks.

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Take blocks for so many tokens of a sequence, from resting and from younger sequences if need be.

        Returns:
            False if there are too few: the sequence then waits for its turn, preempted if it is the youngest.
        """
        if self._window:
            sequence.give_back(self.blocks, self._window)
        while len(sequence.blocks) * BLOCK_TOKENS < tokens:
            block = self.blocks.take()
            if block is not None:
                sequence.blocks.append(block)
                continue
            victim = self._resting[-1] if self._resting else self.running[-1]
            if victim in self._planned:  # it is in this step already
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preempted += 1
        if sequence.is_outgrown:  # else its next token would follow from keys and values of the shorter text
            sequence.begin_anew()
        if sequence in self._resting:
            self._resting.remove(sequence)
        self._leave(sequence)
        self._queue(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.release(self.blocks)

    def _queue(self, sequence: Sequence) -> None:
        insort(self._queues.setdefault(sequence.lane, []), sequence, key=age)

    def _unqueue(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.lane]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.lane]


def age(sequence: Sequence) -> tuple[int, int]:
    """Return a sequence's place in the order: by priority, then by arrival."""
    return sequence.priority, sequence.arrival


def _missing_blocks(sequence: Sequence) -> int:
    """Count the blocks that a sequence still needs for its tokens and the next one."""
    return -(-(len(sequence.ids) + 1) // BLOCK_TOKENS) - len(sequence.blocks)


def _divide(budget: int, sequences: abc.Sequence[Sequence]) -> dict[Sequence, int]:
    """Divide a step's tokens among prompts, from old to young; see the module.

    The oldest gets what those with fewer tokens left leave, and at least half.
    """
    if not sequences or budget <= 0:
        return {}
    left = {sequence: len(sequence.ids) - sequence.written for sequence in sequences}
    oldest = sequences[0]
    shorter = sum(tokens for tokens in left.values() if tokens < left[oldest])
    granted = {oldest: min(left.pop(oldest), max(budget - shorter, -(-budget // 2)))}
    budget -= granted[oldest]
    for sequence, tokens in sorted(left.items(), key=lambda item: item[1]):
        if budget <= 0:
            break
        granted[sequence] = min(budget, tokens)
        budget -= granted[sequence]
    return granted
