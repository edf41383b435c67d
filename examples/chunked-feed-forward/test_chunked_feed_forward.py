from chunked_feed_forward import ChunkedFeedForward

from autotune.optimizations import find
from autotune.testing import OptimizationConformance
from autotune.testing.pipelines import build_sd, call


class TestChunkedFeedForward(OptimizationConformance):
    optimization = ChunkedFeedForward()


def feed_forwards(*names: str) -> int:
    """How often the first block's feed-forward layer is called in two steps."""
    pipe, calls = build_sd(), []
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.ff.register_forward_hook(lambda *_: calls.append(1))
    ChunkedFeedForward().apply(pipe, {}, "cpu")
    for name in names:
        find(name).apply(pipe, find(name).setting().parameters, "cpu")
    call(pipe)
    return len(calls)


def test_merged_blocks_do_not_chunk():
    assert feed_forwards() == 4
    assert feed_forwards("tome") == 2
