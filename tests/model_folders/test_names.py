from hypothesis import given
from hypothesis import strategies as st

from babel_jax.model.shapes import LAYERS, is_stacked
from babel_jax.model_folders.names import tensor_name, tensor_names, tensor_place

words = st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True)
rest = st.lists(words, min_size=1, max_size=4).map(tuple)


@given(rest=rest, layer=st.integers(0, 500))
def test_a_layer_tensor_has_one_name_and_one_place(rest, layer):
    place = (*LAYERS, *rest)
    name = tensor_name(place, layer)
    assert name == f"model.layers.{layer}.{'.'.join(rest)}"
    assert tensor_place(name) == (place, layer)
    assert is_stacked(place)


@given(place=rest.filter(lambda place: place[:2] != LAYERS))
def test_a_tensor_outside_of_the_layers_keeps_its_name(place):
    assert tensor_place(tensor_name(place, None)) == (place, None)
    assert tensor_names(place, 7) == [".".join(place)]


@given(places=st.sets(rest, min_size=2, max_size=8), layers=st.integers(1, 12))
def test_names_are_distinct(places, layers):
    names = [name for place in places for name in tensor_names((*LAYERS, *place), layers)]
    assert len(set(names)) == len(places) * layers


def test_a_number_written_otherwise_is_no_layer():
    assert tensor_place("model.layers.07.norm.weight") == (("model", "layers", "07", "norm", "weight"), None)
