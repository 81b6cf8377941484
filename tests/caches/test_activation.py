from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilens import errors
from trilens.caches.activation import ActivationCache, FullActivationCache

KINDS = pytest.mark.parametrize(
    ("cls", "shape"), [(ActivationCache, (4,)), (FullActivationCache, (3, 4))]
)


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@KINDS
def test_a_new_cache_is_empty(cls, shape) -> None:
    cache = cls()
    assert cache.is_empty
    assert cache.n_layers == 0
    assert cache.layers == ()
    assert cache.activations == ()
    assert cache.get_layer(0) is None
    assert cache.to_f32_vecs() == []
    assert cache.nbytes == 0
    with pytest.raises(errors.NotStoredError, match="empty cache"):
        cache.stack()
    assert cache.to("cpu").is_empty


@KINDS
@pytest.mark.parametrize("with_capacity", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pushed_layers_come_back(cls, shape, with_capacity, dtype) -> None:
    given_tensors = tensors(5, shape, dtype)
    cache = cls.with_capacity(5) if with_capacity else cls()
    for tensor in given_tensors:
        cache.push(tensor)
    assert not cache.is_empty
    assert cache.n_layers == 5
    assert cache.layers == (0, 1, 2, 3, 4)
    for layer, tensor in enumerate(given_tensors):
        assert torch.equal(cache.get_layer(layer), tensor)
        assert torch.equal(cache.activations[layer], tensor)
    assert torch.equal(cache.stack(), torch.stack(given_tensors))
    assert cache.stack().dtype == dtype


@KINDS
def test_activations_given_to_the_constructor_are_pushed(cls, shape) -> None:
    given_tensors = tensors(3, shape)
    cache = cls(iter(given_tensors))
    assert cache.n_layers == 3
    assert torch.equal(cache.get_layer(2), given_tensors[2])


@KINDS
def test_get_layer_gives_none_where_nothing_is(cls, shape) -> None:
    cache = cls(tensors(2, shape))
    assert cache.get_layer(2) is None
    assert cache.get_layer(-1) is None
    assert cache.get_layer(np.int64(1)) is cache.get_layer(1)
    for wrong in (1.0, "1", None, True):
        with pytest.raises(errors.UsageError, match="is not a whole number"):
            cache.get_layer(wrong)


@KINDS
def test_capacity_is_one_contiguous_tensor_and_stack_a_view(cls, shape) -> None:
    cache = cls.with_capacity(4)
    pushed = tensors(4, shape, torch.bfloat16)
    for count, tensor in enumerate(pushed, start=1):
        cache.push(tensor)
        stacked = cache.stack()
        assert stacked.shape == (count, *shape)
        assert stacked.is_contiguous()
        assert stacked.data_ptr() == cache.get_layer(0).data_ptr()
    storages = {tensor.untyped_storage().data_ptr() for tensor in cache.activations}
    assert len(storages) == 1
    assert cache.nbytes == 4 * int(np.prod(shape)) * 2
    pushed[0].zero_()
    assert cache.get_layer(0).abs().sum() > 0  # a copy


@KINDS
def test_without_capacity_a_push_keeps_a_reference(cls, shape) -> None:
    tensor = torch.ones(shape, requires_grad=True)
    cache = cls([tensor])
    stored = cache.get_layer(0)
    assert stored.data_ptr() == tensor.data_ptr()
    assert not stored.requires_grad
    assert tensor.requires_grad


@KINDS
def test_nothing_that_a_cache_gives_is_part_of_a_graph(cls, shape) -> None:
    graph = torch.ones(shape, requires_grad=True) * 2
    hand, room, sealed = cls([graph]), cls.with_capacity(2), cls.from_layers({0: graph})
    room.push(graph)
    for cache in (hand, room, sealed):
        for tensor in (*cache.activations, cache.stack()):
            assert not tensor.requires_grad
            assert tensor.grad_fn is None


def test_a_buffer_made_in_inference_mode_can_be_filled_outside() -> None:
    cache = ActivationCache.with_capacity(2)
    with torch.inference_mode():
        cache.push(torch.ones(3))
    cache.push(torch.zeros(3))
    assert cache.stack().tolist() == [[1, 1, 1], [0, 0, 0]]


@KINDS
def test_a_full_cache_names_its_capacity(cls, shape) -> None:
    cache = cls.with_capacity(2)
    for tensor in tensors(2, shape):
        cache.push(tensor)
    with pytest.raises(
        errors.OutOfRangeError, match=r"layer 2 is out of range.*with_capacity\(2\)"
    ):
        cache.push(torch.zeros(shape))
    assert cache.n_layers == 2


@pytest.mark.parametrize(
    ("capacity", "error"), [(-1, errors.ValueRangeError), (2.0, errors.UsageError)]
)
def test_a_capacity_is_a_count(capacity, error) -> None:
    with pytest.raises(error, match="capacity"):
        ActivationCache.with_capacity(capacity)


def test_a_capacity_beyond_memory_is_named() -> None:
    cache = ActivationCache.with_capacity(2**50)
    with pytest.raises(errors.TooLargeError, match="capacity 1125899906842624"):
        cache.push(torch.zeros(1024))
    assert cache.is_empty


@KINDS
def test_what_is_no_layer_is_refused(cls, shape) -> None:
    for cache in (cls(), cls.with_capacity(3)):
        cache.push(torch.zeros(shape))
        with pytest.raises(errors.ShapeError, match="has shape"):
            cache.push(torch.zeros((1, *shape)))
        with pytest.raises(errors.ShapeError, match="all layers have the same"):
            cache.push(torch.zeros((*shape[:-1], shape[-1] + 1)))
        with pytest.raises(errors.DtypeError, match="one dtype"):
            cache.push(torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(errors.UsageError, match="is on meta"):
            cache.push(torch.zeros(shape, device="meta"))
        with pytest.raises(errors.DtypeError, match="floating-point"):
            cache.push(torch.zeros(shape, dtype=torch.int64))
        with pytest.raises(errors.DtypeError, match="is a list"):
            cache.push([0.0])
        assert cache.n_layers == 1
    with pytest.raises(errors.ShapeError, match="empty"):
        cls([torch.zeros((*shape[:-1], 0))])


@KINDS
def test_sealed_caches_are_keyed_by_the_models_layers(cls, shape) -> None:
    five, two = tensors(2, shape)
    cache = cls.from_layers({5: five, 2: two})
    assert cache.layers == (2, 5)
    assert cache.n_layers == 2
    assert torch.equal(cache.get_layer(5), five)
    assert cache.get_layer(0) is None
    assert cache.get_layer(3) is None
    assert torch.equal(cache.stack(), torch.stack([two, five]))
    with pytest.raises(errors.UsageError, match="sealed: it holds layers 2, 5 of a capture"):
        cache.push(two)
    with pytest.raises(errors.UsageError, match="sealed"):
        cache.to("cpu").push(two)
    with pytest.raises(errors.UsageError, match="sealed"):
        cls.from_layers({}).push(two)


@KINDS
def test_sealed_caches_refuse_what_does_not_fit(cls, shape) -> None:
    ok = torch.zeros(shape)
    with pytest.raises(errors.ValueRangeError, match="layer -1"):
        cls.from_layers({-1: ok})
    with pytest.raises(errors.UsageError, match="whole number"):
        cls.from_layers({"0": ok})
    with pytest.raises(errors.ShapeError, match="tensor of layer 7"):
        cls.from_layers({1: ok, 7: torch.zeros((*shape[:-1], 9))})
    with pytest.raises(errors.DtypeError, match="tensor of layer 7"):
        cls.from_layers({1: ok, 7: ok.double()})


def test_layers_of_a_model_may_lie_on_several_devices_but_do_not_stack() -> None:
    cache = ActivationCache.from_layers({0: torch.zeros(4), 1: torch.zeros(4, device="meta")})
    assert cache.n_layers == 2
    with pytest.raises(errors.UsageError, match="cpu, meta"):
        cache.stack()


@KINDS
def test_f32_vectors_are_own_arrays(cls, shape) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        source = tensors(2, shape, dtype)
        cache = cls(source)
        vectors = cache.to_f32_vecs()
        for vector, tensor in zip(vectors, source, strict=True):
            assert vector.dtype == np.float32
            assert vector.shape == shape
            # bfloat16 → float32 is exact; float64 is rounded once, by both libraries alike
            assert vector.tolist() == tensor.double().numpy().astype(np.float32).tolist()
        vectors[0][...] = 7
        assert not (cache.get_layer(0) == 7).any()


def test_nbytes_counts_every_storage_once() -> None:
    base = torch.zeros(10, 4)
    assert ActivationCache([base[0], base[1]]).nbytes == 160
    assert ActivationCache([base[0].clone(), base[1].clone()]).nbytes == 32
    assert ActivationCache([base[0], torch.zeros(4)]).nbytes == 176


@KINDS
@pytest.mark.parametrize("capacity", [None, 3, 5])
def test_to_gives_a_new_cache(cls, shape, capacity) -> None:
    cache = cls() if capacity is None else cls.with_capacity(capacity)
    for tensor in tensors(3, shape):
        cache.push(tensor)
    moved = cache.to("meta")
    assert moved is not cache
    assert moved.layers == cache.layers
    assert moved.stack().device.type == "meta"
    same = cache.to("cpu")
    assert torch.equal(same.stack(), cache.stack())
    assert (same.get_layer(0).data_ptr() == cache.get_layer(0).data_ptr()) == (capacity != 5)
    with pytest.raises(errors.UsageError, match="'nowhere' cannot be used"):
        cache.to("nowhere")


def test_two_caches_never_grow_into_one_buffer() -> None:
    cache = ActivationCache.with_capacity(2)
    cache.push(torch.zeros(3))
    other = cache.to("cpu")
    cache.push(torch.full((3,), 1.0))
    other.push(torch.full((3,), 2.0))
    assert cache.get_layer(1).tolist() == [1, 1, 1]
    assert other.get_layer(1).tolist() == [2, 2, 2]
    assert other.stack().data_ptr() == other.get_layer(0).data_ptr()


def test_repr_says_what_is_inside() -> None:
    assert repr(ActivationCache()) == "ActivationCache(empty)"
    assert repr(ActivationCache.with_capacity(8)) == "ActivationCache(empty, capacity 8)"
    cache = FullActivationCache([torch.zeros(3, 4)] * 2)
    assert repr(cache) == "FullActivationCache(layers 0–1, seq 3, d_model 4, float32, cpu)"
    sealed = ActivationCache.from_layers({1: torch.zeros(4), 5: torch.zeros(4)})
    assert repr(sealed) == "ActivationCache(layers 1, 5, d_model 4, float32, cpu)"


@settings(deadline=None)
@given(seq=st.integers(1, 6), position=st.integers(-8, 8), layer=st.integers(0, 1))
def test_positions_count_from_both_ends(seq: int, position: int, layer: int) -> None:
    values = torch.arange(2 * seq * 3, dtype=torch.float32).reshape(2, seq, 3)
    cache = FullActivationCache(values.unbind(0))
    assert cache.seq_len == seq
    if -seq <= position < seq:
        row = cache.get_position(layer, position)
        assert row.tolist() == values[layer].tolist()[position]
        row.zero_()
        assert torch.equal(cache.get_layer(layer), values[layer])  # a copy
    else:
        with pytest.raises(errors.OutOfRangeError, match=f"positions −{seq}–{seq - 1}"):
            cache.get_position(layer, position)


def test_positions_of_layers_that_are_not_there() -> None:
    cache = FullActivationCache.from_layers({2: torch.zeros(3, 4), 5: torch.zeros(3, 4)})
    with pytest.raises(errors.OutOfRangeError, match=r"layer 6 is not stored: .* layers 2, 5"):
        cache.get_position(6, 0)
    with pytest.raises(errors.OutOfRangeError, match="layer -1 is not stored"):
        cache.get_position(-1, 0)
    with pytest.raises(errors.NotStoredError, match=r"layer 3 is not stored.*layers 2, 5"):
        cache.get_position(3, 0)
    with pytest.raises(errors.NotStoredError, match="no layers"):
        FullActivationCache().get_position(0, 0)
    with pytest.raises(errors.UsageError, match="position"):
        cache.get_position(2, 0.5)
    assert FullActivationCache().seq_len == 0


def test_last_is_a_sealed_cache_of_copies() -> None:
    full = FullActivationCache.from_layers({1: torch.rand(3, 4), 4: torch.rand(3, 4)})
    last = full.last()
    assert isinstance(last, ActivationCache)
    assert not isinstance(full, ActivationCache)
    assert last.layers == (1, 4)
    for layer in last.layers:
        assert torch.equal(last.get_layer(layer), full.get_layer(layer)[-1])
    assert last.nbytes == 2 * 4 * 4  # nothing of the sequence is kept alive
    assert FullActivationCache().last().is_empty
