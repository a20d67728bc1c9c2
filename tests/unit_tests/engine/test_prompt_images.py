"""The images of one prompt: places, positions, and the content of blocks."""

from __future__ import annotations

import torch

from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.prompt_images import Image, PromptImages
from langchain_quantllm.engine.sequence import Sequence, bare_sequence
from langchain_quantllm.engine.step import PrefillChunk, Step, split_step

PLACES = [4, 5, 6, 20, 21, 23, 24, 25]
IDS = [9 if i in PLACES else i + 100 for i in range(50)]


def image(content: int, tokens: int) -> Image:
    return Image(inputs={}, content=content, tokens=tokens)


def images(first: int = 1, second: int = 2) -> PromptImages:
    return PromptImages([image(first, 3), image(second, 5)], PLACES)


def test_rows_of_a_part_of_a_prompt() -> None:
    found = images()
    assert [(r.image.content, r.first, r.rows) for r in found.rows(0, 50)] == [
        (1, 0, [4, 5, 6]),
        (2, 0, [20, 21, 23, 24, 25]),
    ]
    assert [(r.image.content, r.first, r.rows) for r in found.rows(5, 16)] == [(1, 1, [0, 1]), (2, 0, [15])]
    assert [(r.image.content, r.first, r.rows) for r in found.rows(22, 2)] == [(2, 2, [1])]
    assert not list(found.rows(22, 1))
    assert not list(found.rows(7, 13))
    assert not list(found.rows(26, 100))


def test_the_content_of_blocks_is_that_of_their_images() -> None:
    content = images().content(0, IDS[:16])
    assert [i for i, one in enumerate(content) if one < 0] == [4, 5, 6]
    assert len(set(content)) == 16
    assert content == images(1, 3).content(0, IDS[:16])
    assert content != images(3, 2).content(0, IDS[:16])
    # The same image, one token further on.
    assert images().content(20, IDS[20:36])[0] != images(1, 2).content(21, IDS[21:37])[0]
    assert images().content(32, IDS[32:48]) == IDS[32:48]


def test_chunks_do_not_end_within_images_that_look_ahead() -> None:
    found = PromptImages([image(1, 3), image(2, 5)], PLACES, looks_ahead="everywhere")  # the second one in two runs
    ends = {3: 3, 4: 4, 5: 4, 6: 4, 7: 7, 21: 20, 22: 22, 23: 23, 24: 23, 26: 26}
    assert {end: found.chunk_end(0, end) for end in ends} == ends
    assert (found.chunk_end(4, 5), found.chunk_end(5, 6), found.chunk_end(23, 24)) == (7, 7, 26)
    assert images().chunk_end(4, 5) == 5
    assert found.groups(0, 21) == ((4, 7), (20, 22))
    assert found.groups(7, 13) == ()
    assert images().groups(0, 50) == ()


def test_images_that_see_each_other_are_one_content() -> None:
    def content(*contents: int) -> list[int]:
        places = range(4, 4 + 2 * len(contents))
        found = PromptImages([image(one, 2) for one in contents], places, looks_ahead="everywhere")
        return list(found.content(0, IDS[:16]))

    assert content(1, 2) == content(1, 2)
    assert content(1, 2)[4:6] != content(1, 3)[4:6]
    assert content(1, 2)[6:8] != content(3, 2)[6:8]
    assert content(1, 2) != content(2, 1)


def test_an_image_that_looks_ahead_is_not_divided_for_lack_of_memory() -> None:
    found = PromptImages([image(1, 20)], range(4, 24), looks_ahead="everywhere")
    step = Step([], [], [PrefillChunk(sequence(found), 0, 50, is_last=True)])
    first, rest = split_step(step, 16)
    assert [(c.start, c.count, c.is_last) for c in first.chunks] == [(0, 4, False)]
    first, rest = split_step(rest, 16)
    assert [(c.start, c.count, c.is_last) for c in first.chunks] == [(4, 20, False)]
    assert [(c.start, c.count, c.is_last) for c in rest.chunks] == [(24, 26, True)]
    only = Step([], [], [PrefillChunk(sequence(found), 4, 20, is_last=True)])
    first, rest = split_step(only, 16)
    assert (first.chunks, rest.chunks) == (only.chunks, [])


def sequence(found: PromptImages, ids: list[int] = IDS) -> Sequence:
    found.are_read = True
    return bare_sequence(ids, 4, prefix_id=1, images=found)


def written(manager: BlockManager, one: Sequence) -> int:
    """Let a sequence share what it can, and write the rest; returns how many tokens it has shared."""
    one.share(manager)
    shared = one.written
    while len(one.blocks) * 16 < len(one.ids):
        block = manager.take()
        assert block is not None
        one.blocks.append(block)
    one.written = len(one.ids)
    one.register(manager)
    return shared


def test_sequences_share_blocks_up_to_an_image_that_differs() -> None:
    manager = BlockManager(40)
    assert manager.new_prefix_id() == 1
    assert written(manager, sequence(images())) == 0
    assert written(manager, sequence(images())) == 48
    assert written(manager, sequence(images(1, 3))) == 16
    assert written(manager, sequence(images(3, 2))) == 0
    assert written(manager, bare_sequence(IDS, 4, prefix_id=1)) == 0
    assert sequence(images()).find_shared(manager) == (3, 3)
    assert sequence(images(1, 3)).find_shared(manager) == (3, 3)
    assert sequence(images(1, 4)).find_shared(manager) == (1, 1)
    manager.check_integrity()


def test_a_sequence_waits_until_its_images_are_read() -> None:
    one = bare_sequence(IDS, 4, images=images())
    assert not one.is_known
    assert one.images is not None
    one.images.are_read = True
    assert one.is_known


def test_positions_of_prompt_and_generated_tokens() -> None:
    given = torch.arange(30).reshape(3, 10) * 2
    found = PromptImages([image(1, 2)], [3, 4], given, -4)
    assert torch.equal(found.positions_of(2, 5), given[:, 2:7].int())
    assert found.positions_of(8, 4).tolist() == [[*row[8:].tolist(), 6, 7] for row in given]
    assert found.positions_of(12, 2).tolist() == [[8, 9]] * 3
    assert images().positions_of(3, 2).tolist() == [[3, 4]] * 3
    assert bare_sequence(IDS, 4).rope_positions(7, 2).tolist() == [[7, 8]] * 3
