"""The cache gives back what was written."""

import psutil
import pytest
import torch

from gateway.kv_cache import KVCache, LayerShape, blocks_in

PLAIN = LayerShape(heads=2, key_dim=4, value_dim=3)
LATENT = LayerShape(heads=1, key_dim=6, value_dim=6, values_in_keys=True)


def test_reads_what_was_written_in_the_order_of_the_table() -> None:
    cache = KVCache({3: PLAIN, 5: LATENT}, blocks=6, block_size=2, dtype=torch.float32)
    table = [4, 1, 2]
    slots = torch.tensor(cache.slots(table, 0, 5))
    assert slots.tolist() == [8, 9, 2, 3, 4]
    keys, values, latents = torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(1, 5, 6)
    cache.write(3, slots, keys, values)
    cache.write(5, slots, latents, latents)

    read_keys, read_values = cache.read(3, torch.tensor(table))
    assert read_keys[:, :5].equal(keys)
    assert read_values[:, :5].equal(values)
    assert read_keys[:, 5].count_nonzero() == 0  # behind the last token: zeros, never rubbish
    read_latents, same = cache.read(5, torch.tensor(table))
    assert read_latents[:, :5].equal(latents)
    assert same is read_latents


def test_clear_zeroes_the_blocks_and_no_others() -> None:
    cache = KVCache({0: PLAIN}, blocks=3, block_size=2, dtype=torch.float32)
    cache.write(0, torch.arange(6), torch.full((2, 6, 4), float("nan")), torch.ones(2, 6, 3))
    cache.clear([0, 2])
    keys, values = cache.read(0, torch.tensor([0, 1, 2]))
    assert keys[:, [0, 1, 4, 5]].count_nonzero() == 0
    assert keys[:, [2, 3]].isnan().all()
    assert values[:, [2, 3]].equal(torch.ones(2, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_fill_the_gibibytes(dtype: torch.dtype) -> None:
    shapes = {0: PLAIN, 1: LATENT}
    per_block = (2 * (4 + 3) + 6) * dtype.itemsize * 16
    assert blocks_in(0.5, shapes, dtype, 16) == 2**29 // per_block


def test_too_small_a_cache_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kv_cache_gib"):
        blocks_in(1e-9, {0: PLAIN}, torch.float32, 16)


def test_memory_is_not_touched_before_it_is_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    shape = LayerShape(heads=4, key_dim=64, value_dim=64)
    cache = KVCache(
        {0: shape}, blocks=blocks_in(2, {0: shape}, torch.bfloat16, 16), block_size=16, dtype=torch.bfloat16
    )
    cache.write(0, torch.arange(8), torch.ones(4, 8, 64).bfloat16(), torch.ones(4, 8, 64).bfloat16())
    assert cache.blocks * 16 * shape.numbers * 2 == 2 * 2**30
    assert process.memory_info().rss - before < 64 * 2**20
