"""The few-shot example's data sets, episodes and networks."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.func import grad, vmap

from fewshot import glyphs, nets, omniglot
from fewshot.episodes import Distortion, Episodes, Tasks
from fewshot.split import Split, rotated

OMNIGLOT = Path(__file__).parents[2] / "shared" / "data" / "omniglot"
needs_omniglot = pytest.mark.skipif(
    not OMNIGLOT.is_dir(), reason=f"the real Omniglot archives are not in {OMNIGLOT}"
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tagged(classes: int, examples: int) -> Tensor:
    """Images that say who they are: every pixel is the image's own number."""
    number = torch.arange(float(classes * examples)).view(classes, examples, 1, 1)
    return number.expand(-1, -1, 28, 28)


def same(a: Tasks, b: Tasks) -> bool:
    pairs = zip((*a.support, *a.query), (*b.support, *b.query), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# Episodes ---------------------------------------------------------------------------


@pytest.mark.parametrize("ways, shots, queries", [(5, 1, 15), (5, 5, 15), (20, 1, 3)])
def test_shapes_and_types(ways: int, shots: int, queries: int):
    images = torch.rand(30, 20, 28, 28)
    episodes = Episodes(images, ways, shots, queries, generator=seeded())
    for batch, n in zip(episodes.sample(4), (shots, queries), strict=True):
        assert batch.x.shape == (4, ways * n, 1, 28, 28)
        assert batch.y.shape == (4, ways * n)
        assert (batch.x.dtype, batch.y.dtype) == (torch.float32, torch.int64)


def test_support_and_query_share_no_image_and_agree_on_labels():
    tasks = Episodes(tagged(40, 20), 5, 5, 15, generator=seeded()).sample(50)
    shown = [batch.x[..., 0, 0, 0].long() for batch in tasks]
    for i in range(50):
        used = torch.cat([numbers[i] for numbers in shown])
        assert used.unique().numel() == 5 * 20  # each image once, in one part only
        owner = {
            (int(number) // 20, int(label))
            for batch, numbers in zip(tasks, shown, strict=True)
            for number, label in zip(numbers[i], batch.y[i], strict=True)
        }
        assert len(owner) == 5  # a class has one label, a label one class
        for batch, n in zip(tasks, (5, 15), strict=True):
            assert batch.y[i].bincount().tolist() == [n] * 5


def test_labels_and_classes_are_random():
    tasks = Episodes(tagged(6, 4), 3, 1, 1, generator=seeded()).sample(3000)
    owner = tasks.support.x[..., 0, 0, 0].long() // 4
    counts = F.one_hot(owner, 6).sum(0)  # [label, class], 500 expected
    assert (counts - 500).abs().max() < 120


def test_few_examples_are_shown_again_distorted_but_never_the_support():
    images = tagged(8, 12)
    still = Distortion(0, 0, 0, 0)  # keeps the numbers readable
    tasks = Episodes(images, 5, 2, 15, still, generator=seeded()).sample(20)
    support, query = (batch.x[..., 0, 14, 14].round().long() for batch in tasks)
    for i in range(20):
        assert not set(support[i].tolist()) & set(query[i].tolist())
        repeats = query[i].unique(return_counts=True)[1]
        assert sorted(set(repeats.tolist())) == [1, 2]  # 15 queries of 10, evenly
    images = torch.rand(5, 2, 28, 28)
    query = Episodes(images, 5, 1, 3, Distortion(), generator=seeded()).sample(1).query
    assert query.x[0].flatten(1).unique(dim=0).shape[0] == 15  # no two the same


@pytest.mark.parametrize("distort", [None, Distortion()])
def test_a_restored_generator_resumes_bit_for_bit(distort: Distortion | None):
    images = torch.rand(30, 20, 28, 28)
    episodes = Episodes(images, 5, 1, 15, distort, generator=seeded())
    first, state = episodes.sample(4), episodes.generator.get_state()
    second = episodes.sample(4)
    resumed = Episodes(images, 5, 1, 15, distort, generator=torch.Generator())
    resumed.generator.set_state(state)
    assert same(resumed.sample(4), second) and not same(first, second)


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    images = torch.rand(9, 9, 28, 28, generator=seeded())
    Episodes(images, 5, 1, 15, Distortion(), generator=seeded()).sample(2)
    assert torch.equal(before, torch.get_rng_state())


def test_distortion_without_width_is_the_identity_and_keeps_ink_in_range():
    images = torch.rand(16, 28, 28)
    assert torch.allclose(Distortion(0, 0, 0, 0)(images, seeded()), images, atol=1e-5)
    moved = Distortion()(images, seeded())
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-5
    assert not torch.allclose(moved, images, atol=0.1)


def test_distortion_is_small():
    square = torch.zeros(500, 28, 28)
    square[:, 8:20, 8:20] = 1
    moved = Distortion()(square, seeded())
    place = torch.arange(28.0)
    for axis in (1, 2):
        centre = (moved.sum(3 - axis) * place).sum(1) / moved.sum((1, 2))
        assert (centre - 13.5).abs().max() < 1.8
    assert (moved.sum((1, 2)) / 144).sub(1).abs().max() < 0.25


@pytest.mark.parametrize(
    "shape, ways, shots, queries, words",
    [
        ((4, 20, 28, 28), 5, 1, 15, "5 ways, but there are 4 classes"),
        ((9, 12, 28, 28), 5, 12, 15, "12 shots leave no query images: a class has 12"),
        ((9, 12, 28, 28), 5, 1, 15, "only 12 images: ask for at most 11 queries"),
        ((9, 12, 28, 28), 0, 1, 15, "got 0 ways, 1 shots, 15 queries"),
        ((9, 12, 28, 28), 5, 1, 0, "got 5 ways, 1 shots, 0 queries"),
        ((9, 28, 28), 5, 1, 15, r"got \[9, 28, 28\]"),
    ],
)
def test_impossible_episodes_are_refused_with_the_numbers(
    shape: tuple[int, ...], ways: int, shots: int, queries: int, words: str
):
    with pytest.raises(ValueError, match=words):
        Episodes(torch.zeros(shape), ways, shots, queries, generator=seeded())


# Glyphs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed() -> tuple[Split, Split]:
    return glyphs.load()


def test_glyphs_are_many_in_range_and_of_separate_scripts(printed: tuple[Split, Split]):
    train, test = printed
    for split, least in ((train, 400), (test, 140)):
        classes = len(split.names)
        assert classes == len(split.alphabets) >= least
        assert split.images.shape == (classes, 12, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.images.min() == 0 and 0.9 < split.images.max() <= 1
        assert (split.images.flatten(2).sum(2) > 3).all()  # nothing blank
        # Ink is 1: letters cover less than half of the paper, and not its rim.
        assert split.images.mean() < 0.25
        assert split.images[:, :, 0].max() == 0 and split.images[:, :, :, 0].max() == 0
    assert set(train.alphabets) == {"Latin", "Greek"}
    assert set(test.alphabets) == {"Cyrillic", "Armenian", "Georgian"}


def test_no_two_glyph_classes_look_alike(printed: tuple[Split, Split]):
    train, test = printed
    everything = torch.cat([train.images, test.images])
    apart = glyphs.distances(everything, everything).fill_diagonal_(1)
    # 1e-4: the product of other shapes sums in another order.
    assert apart.min() > glyphs.NEAR - 1e-4


def test_homoglyphs_of_training_letters_are_not_tested(printed: tuple[Split, Split]):
    train, test = printed
    assert {"A", "Ω", "Ξ"} <= set(train.names) and {"Ж", "Я", "ა"} <= set(test.names)
    assert "Α" not in train.names  # GREEK CAPITAL LETTER ALPHA, after Latin A
    twins = "АВЕКМНОРСТХасеорхуіјѕ"  # Cyrillic, each with a Latin twin
    assert not set(twins) & set(test.names)


def test_distances_are_relative_to_the_ink():
    dot, far = torch.zeros(2, 1, 12, 28, 28)
    dot[..., :2, :2] = 1
    far[..., 9:, 9:] = 1
    found = glyphs.distances(torch.cat([dot, far]), torch.cat([dot, far]))
    assert torch.allclose(found, 1 - torch.eye(2), atol=1e-6)


def test_rotated_makes_a_class_of_each_quarter_turn():
    split = Split(torch.rand(3, 2, 28, 28), ["a", "b", "c"], ["x", "x", "y"])
    turned = rotated(split)
    assert turned.images.shape == (12, 2, 28, 28)
    assert torch.equal(turned.images[:3], split.images)
    assert torch.equal(turned.images[4, 1], split.images[1, 1].rot90(1))
    assert turned.names[4] == "b, 90°" and turned.alphabets[4] == "x"


# Omniglot ---------------------------------------------------------------------------


def drawing(side: int = 105) -> bytes:
    image = Image.new("1", (side, side), 1)  # white paper, as in the archives
    ImageDraw.Draw(image).line((20, 50, 80, 50), fill=0, width=3)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def archive(folder: Path, characters: int = 2, **changed: bytes | None) -> Path:
    """A small zip in Omniglot's layout; ``c1_03=`` replaces or (None) omits a file."""
    path = folder / "images_background.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for character in range(1, characters + 1):
            for drawer in range(1, 21):
                png = changed.get(f"c{character}_{drawer:02}", drawing())
                name = f"Runes/character{character:02}/{character:04}_{drawer:02}.png"
                if png is not None:
                    file.writestr(f"images_background/{name}", png)
        file.writestr("__MACOSX/images_background/Runes/character01/._1.png", b"?")
    return path


def test_an_archive_and_its_folder_read_the_same(tmp_path: Path):
    path = archive(tmp_path)
    zipped = omniglot.read(path, characters=2)
    assert zipped.images.shape == (2, 20, 28, 28)
    assert zipped.names == ["Runes/character01", "Runes/character02"]
    assert zipped.alphabets == ["Runes", "Runes"]
    ink = zipped.images[0, 0]
    assert ink[0].max() == 0 and ink[13, 10] > 0.5  # paper is 0, the stroke is ink
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path)
    folder = omniglot.read(tmp_path / "images_background", characters=2)
    assert torch.equal(folder.images, zipped.images) and folder.names == zipped.names
    assert omniglot.find(tmp_path, "images_background") == path
    path.unlink()
    assert omniglot.find(tmp_path, "images_background").is_dir()


def test_missing_archives_are_named_with_where_to_get_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="images_background.zip") as error:
        omniglot.load(tmp_path / "nowhere")
    assert "nowhere" in str(error.value) and omniglot.SOURCE in str(error.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_member(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        start = file.infolist()[5].header_offset + 90
    content = bytearray(path.read_bytes())
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)


def not_a_zip(path: Path) -> None:
    path.write_text("<html>404: Not Found</html>")


def empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


@pytest.mark.parametrize("damage", [truncate, flip_a_member, not_a_zip, empty_zip])
def test_damaged_archives_are_refused(tmp_path: Path, damage):
    path = archive(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match="is damaged") as error:
        omniglot.load(tmp_path)
    assert str(path) in str(error.value) and omniglot.SOURCE in str(error.value)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"c1_03": None}, "19 drawings of Runes/character01, not 20"),
        ({"c2_07": b"not a picture"}, "0002_07.png"),
        ({"c2_07": drawing()[:80]}, "0002_07.png"),
        ({"c2_07": drawing(28)}, r"0002_07.png is \(28, 28\), not \(105, 105\)"),
        ({"characters": 3}, "3 characters, not 2"),
    ],
)
def test_archives_with_wrong_contents_are_refused(tmp_path: Path, changed, words: str):
    with pytest.raises(ValueError, match=words):
        omniglot.read(archive(tmp_path, **changed), characters=2)


@pytest.mark.slow
@needs_omniglot
def test_the_real_omniglot():
    train, test = omniglot.load(OMNIGLOT, rotations=False)
    assert train.images.shape == (964, 20, 28, 28)
    assert test.images.shape == (659, 20, 28, 28)
    assert len(set(train.alphabets)) == 30 and len(set(test.alphabets)) == 20
    assert not set(train.alphabets) & set(test.alphabets)
    for images in (train.images, test.images):
        assert images.min() == 0 and images.max() == 1
        assert 0.02 < images.mean() < 0.15  # thin strokes are ink, the rest is paper


# Networks ---------------------------------------------------------------------------

NETS = {
    "conv4": nets.conv4(5, filters=8),
    "conv4-pool": nets.conv4(5, filters=8, pool=True),
    "mlp": nets.mlp(5, widths=(16, 8)),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nets.Net:
    return NETS[request.param]


def test_nets_start_from_the_generator_and_give_logits(net: nets.Net):
    params, again = net.init(seeded()), net.init(seeded())
    assert {"head.weight", "head.bias", "norm1.weight", "norm1.bias"} <= set(params)
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert net.apply(params, torch.rand(10, 1, 28, 28)).shape == (10, 5)


def test_omniglot_nets_have_the_papers_sizes():
    conv, full = nets.conv4(5).init(seeded()), nets.mlp(5).init(seeded())
    assert sum(p.numel() for p in conv.values()) == 112_005
    assert conv["conv4.weight"].shape == (64, 64, 3, 3)
    widths = [full[f"linear{layer}.weight"].shape[0] for layer in range(1, 5)]
    assert widths == [256, 128, 64, 64]
    assert full["linear1.weight"].abs().max() <= 0.02


def test_meta_gradients_agree_however_they_are_taken(net: nets.Net):
    params = {name: p.double() for name, p in net.init(seeded()).items()}
    images = torch.rand(30, 20, 28, 28, dtype=torch.float64, generator=seeded())
    support, query = Episodes(images, 5, 1, 3, generator=seeded()).sample(3)

    def loss(params: nets.Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net.apply(params, x), y)

    def adapted_loss(params: nets.Params, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor):
        slope = grad(loss)(params, x, y)
        adapted = {name: params[name] - 0.4 * slope[name] for name in params}
        return loss(adapted, qx, qy)

    tasks = (*support, *query)
    over_tasks = (None, 0, 0, 0, 0)
    looped = [grad(adapted_loss)(params, *(x[i] for x in tasks)) for i in range(3)]
    inside = vmap(grad(adapted_loss), over_tasks)(params, *tasks)
    outside = grad(lambda p: vmap(adapted_loss, over_tasks)(p, *tasks).mean())(params)
    for name in params:
        expected = torch.stack([task[name] for task in looped])
        scale = max(1.0, float(expected.abs().max()))
        assert (inside[name] - expected).abs().max() < 1e-12 * scale
        assert (outside[name] - expected.mean(0)).abs().max() < 1e-12 * scale


def test_meta_gradient_matches_finite_differences(net: nets.Net):
    params = {name: p.double() for name, p in net.init(seeded()).items()}
    x = torch.rand(10, 1, 28, 28, dtype=torch.float64, generator=seeded())
    y = torch.arange(5).repeat(2)

    def adapted(head: Tensor) -> Tensor:
        changed = params | {"head.weight": head}

        def loss(params: nets.Params) -> Tensor:
            return F.cross_entropy(net.apply(params, x), y)

        slope = grad(loss)(changed)
        return loss({name: changed[name] - 0.1 * slope[name] for name in changed})

    head = params["head.weight"]
    way = torch.randn(head.shape, dtype=torch.float64, generator=seeded())
    step = 1e-6
    measured = (adapted(head + step * way) - adapted(head - step * way)) / (2 * step)
    assert torch.isclose((grad(adapted)(head) * way).sum(), measured, rtol=1e-5)
