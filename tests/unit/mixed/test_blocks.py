"""Which convolutions make a block."""

from pipeline.mixed.blocks import blocks


def test_modules_by_the_first_part_that_tells_some_apart():
    names = ["model.inc.0", "model.inc.1", "model.down1.0", "model.down1.1", "model.out"]
    assert blocks({name: name for name in names}, {}) == {
        "model.inc": ("model.inc.0", "model.inc.1"),
        "model.down1": ("model.down1.0", "model.down1.1"),
        "model.out": ("model.out",),
    }


def test_slashes_are_parts_too():
    names = ["/inc/a/Conv", "/inc/b/Conv", "/out/Conv"]
    assert list(blocks({name: name for name in names}, {})) == ["inc", "out"]


def test_resolutions_where_names_tell_nothing():
    sizes = {"a": 64, "b": 64, "c": 32, "d": 64}
    shapes = {name: (1, 8, side, 2 * side) for name, side in sizes.items()}
    assert blocks({name: name for name in sizes}, shapes) == {
        "128×64 (1)": ("a", "b"),
        "64×32 (1)": ("c",),
        "128×64 (2)": ("d",),
    }


def test_unknown_sizes_and_nothing():
    assert blocks({"a": "a", "b": "b"}, {}) == {"unknown size (1)": ("a", "b")}
    assert blocks({}, {}) == {}
