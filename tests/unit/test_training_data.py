"""From pictures and captions to batches: what is paired, what is kept, what is left out, and what is said of it."""

import dataclasses
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import atomtune
from atomtune.backbones import Backbone, backbone_of, select
from atomtune.data.cache import Cache
from atomtune.data.folder import scan
from atomtune.data.picture import fit, open_picture, to_tensor
from atomtune.data.sheet import seen
from atomtune.data.views import View
from atomtune.errors import UserError
from atomtune.training import encode, objective
from atomtune.training.batch import Batch, draw, generator_of
from atomtune.training.encode import Encoder
from atomtune.training.ends import attach_atoms
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material, cut_off, lost_words, prepare
from atomtune.tuner import remove_adapter

OPTIONS = TrainOptions(concept="kite", class_noun="toy", batch_size=2, unrelated_pictures=2, gate=False, steps=40)


@pytest.fixture
def pipe(shared: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny pipeline, with pictures that it need not paint."""

    def generate(_: Any, prompts: Any, seed: int, width: int, height: int, **__: Any) -> list[Image.Image]:
        colors = [hashlib.sha256(f"{prompt}{seed + i}".encode()).digest()[:3] for i, prompt in enumerate(prompts)]
        return [Image.new("RGB", (width, height), tuple(color)) for color in colors]

    monkeypatch.setattr(encode, "generate", generate)
    return shared


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five pictures of noise, of three shapes, each with its own caption."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.RandomState(0)
    shapes = {"one": (64, 64), "two": (80, 48), "three": (60, 60), "four": (96, 60), "five": (40, 70)}
    for i, (name, shape) in enumerate(shapes.items()):
        Image.fromarray(rng.randint(0, 255, (*shape, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"kite number {name}")
    return folder


@pytest.fixture
def ready(pipe: Any, data: Path, tmp_path: Path) -> Callable[..., Material]:
    def ready(backbone: Backbone | None = None, **changes: Any) -> Material:
        options = dataclasses.replace(OPTIONS, **changes)
        return prepare(pipe, backbone or backbone_of(pipe), data, options, tmp_path / "run")

    return ready


class Spy:
    """A backbone that counts what it encodes."""

    def __init__(self, pipe: Any) -> None:
        plain = backbone_of(pipe)
        self.pictures, self.prompts, self.fail_after = 0, [], 10**6  # type: ignore[var-annotated]

        def encode_pictures(pipe: Any, pixels: Tensor) -> Tensor:
            if self.pictures >= self.fail_after:
                raise torch.OutOfMemoryError("out of memory")
            self.pictures += 1
            return plain.encode_pictures(pipe, pixels)

        def encode_prompts(pipe: Any, prompts: list[str]) -> Any:
            self.prompts += prompts
            return plain.encode_prompts(pipe, prompts)

        self.backbone = dataclasses.replace(plain, encode_pictures=encode_pictures, encode_prompts=encode_prompts)

    def counted(self) -> tuple[int, int]:
        """Pictures and prompts since it was last asked."""
        found = self.pictures, len(self.prompts)
        self.pictures, self.prompts = 0, []
        return found


def batch(material: Material, pipe: Any, micro: int, **changes: Any) -> Batch:
    options = dataclasses.replace(OPTIONS, **changes)
    return draw(material, backbone_of(pipe), options, micro, generator_of(options, micro))


def clean(found: Batch) -> Tensor:
    """The latents that a batch was noised from: x - s v = x0."""
    return found.x - found.s.view(-1, 1, 1, 1) * found.target


# ----------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("changes", [{}, {"buckets": True}, {"buckets": True, "flip": True, "crop": 0.2}], ids=str)
def test_no_picture_is_paired_with_anothers_caption(
    pipe: Any, ready: Callable[..., Material], data: Path, changes: dict[str, Any]
) -> None:
    """Complaint: cached latents or prompts paired with another picture's after a shuffle; here in three epochs."""
    backbone = backbone_of(pipe)
    for _ in ("cold", "warm"):
        material = ready(**changes)
        shown = Counter()  # type: ignore[var-annotated]
        for micro in range(9):
            found = batch(material, pipe, micro, **changes)
            for place, row in enumerate(found.rows.tolist()):
                sample = material.scan.samples[row]
                words = backbone.encode_prompts(pipe, [sample.caption])
                for name, value in select(found.conditioning, torch.tensor([place])).items():
                    length = words[name].shape[1]
                    assert torch.equal(value[:, :length], words[name])
                bucket = next(b for b in material.buckets if row in b.rows)
                at = bucket.rows.index(row)
                number = min(
                    range(len(bucket.latents)), key=lambda n: (clean(found)[place] - bucket.latents[n, at]).abs().max()
                )
                assert torch.allclose(clean(found)[place], bucket.latents[number, at], atol=1e-5)
                shown[row] += 1
        assert sum(shown.values()) == 18
        assert set(shown) == set(range(5))
        for bucket in material.buckets:
            for at, row in enumerate(bucket.rows):
                pixels = to_tensor(seen(material.scan.samples[row], bucket.size))[None]
                assert torch.equal(bucket.latents[0, at], backbone.encode_pictures(pipe, pixels)[0])
        (data / "9.png").write_bytes((data / "0.png").read_bytes())  # the same bytes, another caption
        (data / "9.txt").write_text("a kite at the top")
        assert ready(**changes).captions[-1] == "a kite at the top"
        (data / "9.png").unlink()
        (data / "9.txt").unlink()


def test_one_edit_encodes_one_item_again(pipe: Any, ready: Callable[..., Material], data: Path) -> None:
    """Complaint: edited picture, old cache used; or one new picture encodes all of them again."""
    spy = Spy(pipe)
    first = ready(spy.backbone)
    assert spy.counted() == (6, 7), "5 pictures and those that were painted; 5 captions, a prompt and no words"
    ready(spy.backbone)
    assert spy.counted() == (0, 0)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(data / "2.png")
    assert not torch.equal(ready(spy.backbone).latents[2], first.latents[2])
    assert spy.counted() == (1, 0)
    (data / "3.txt").write_text("a kite, mended")
    changed = ready(spy.backbone)
    assert spy.counted() == (0, 1)
    assert torch.equal(changed.latents[3], first.latents[3])
    Image.new("RGB", (64, 64), (8, 8, 8)).save(data / "2.png")
    scanned = scan(data)
    Image.new("RGB", (64, 64), (7, 7, 7)).save(data / "2.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atomtune.training.prepare.scan", lambda *_, **__: scanned)
        with pytest.raises(UserError, match=r"2\.png has changed since it was scanned"):
            ready(spy.backbone)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(data / "2.png")
    spy.counted()
    shutil.copy(data / "2.png", data / "7.png")
    (data / "7.txt").write_text("kite number one")
    ready(spy.backbone)
    assert spy.counted() == (0, 0), "known bytes, known words"


def test_what_others_add_to_a_network_is_in_its_key() -> None:
    """A LoRA, a token of its own: one value anywhere, that samples of the weights would pass over."""
    first, *others = (torch.nn.Embedding(5000, 8) for _ in range(3))
    for other in others:
        other.load_state_dict(first.state_dict())
    others[0].weight.data[4321, 3] += 1
    others[1].lora_A = torch.nn.Linear(2, 2)
    keys = set()
    for network in (first, *others):
        network.config = {"width": 8}
        keys.add(encode.weights_key(network))
    assert len(keys) == 3


def test_a_cache_is_safe_to_delete(ready: Callable[..., Material], tmp_path: Path) -> None:
    first = ready()
    shutil.rmtree(tmp_path / ".cache")
    again = ready()
    assert torch.equal(first.latents, again.latents)
    assert all(torch.equal(first.conditioning[name], again.conditioning[name]) for name in first.conditioning)


def test_another_precision_or_size_finds_nothing_in_the_cache(pipe: Any, tmp_path: Path) -> None:
    """Complaint: precision changed, old text cache reused: NaN."""
    keys = {"float32": Encoder(pipe, backbone_of(pipe), Cache(tmp_path))}
    parts = (pipe.vae, pipe.text_encoder, pipe.transformer)
    try:
        for part in parts:
            part.to(torch.bfloat16)
        keys["bfloat16"] = Encoder(pipe, backbone_of(pipe), Cache(tmp_path))
    finally:
        for part in parts:
            part.to(torch.float32)
    for name in ("vae", "text", "base"):
        assert getattr(keys["float32"], name) != getattr(keys["bfloat16"], name)


def test_a_killed_run_encodes_only_the_rest(pipe: Any, ready: Callable[..., Material]) -> None:
    """Complaints: a crash loses the cached work; running out of memory while caching is swallowed."""
    spy = Spy(pipe)
    spy.fail_after = 4
    with pytest.raises(torch.OutOfMemoryError):
        ready(spy.backbone)
    assert spy.counted()[0] == 4
    spy.fail_after = 10**6
    ready(spy.backbone)
    assert spy.counted()[0] == 2


def test_a_broken_picture_stops_before_anything_is_encoded(
    pipe: Any, ready: Callable[..., Material], data: Path
) -> None:
    """Complaint: one bad picture kills caching after hours."""
    spy, whole = Spy(pipe), (data / "4.png").read_bytes()
    (data / "4.png").write_bytes(whole[:-200])
    with pytest.raises(UserError, match=r"4\.png \(cannot be decoded"):
        ready(spy.backbone)
    assert spy.counted() == (0, 0)


@pytest.mark.parametrize(
    ("kind", "named"), [("encode_pictures", r"0\.png"), ("encode_prompts", "the prompt 'kite, mended'")]
)
def test_what_a_precision_cannot_hold_is_named_with_it_and_not_kept(
    pipe: Any, ready: Callable[..., Material], data: Path, kind: str, named: str
) -> None:
    """Complaints: NaN latents, and an intact picture gets the blame; NaN prompts from a cache."""
    ready()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(data / "0.png")
    (data / "0.txt").write_text("kite, mended")
    plain = backbone_of(pipe)

    def overflows(pipe: Any, given: Any) -> Any:
        found = getattr(plain, kind)(pipe, given)
        values = found.values() if isinstance(found, dict) else (found,)
        spoilt = [v.half() * float("inf") if v.is_floating_point() else v for v in values]
        return dict(zip(found, spoilt, strict=True)) if isinstance(found, dict) else spoilt[0]

    told = f"`dtype` must be .* in float16, .*{named} becomes NaN or infinite, through no fault .* --dtype float32"
    with pytest.raises(UserError, match=told):
        ready(dataclasses.replace(plain, **{kind: overflows}))
    assert ready().latents.isfinite().all()


def test_unrelated_pictures_are_painted_and_kept_a_few_at_a_time(
    pipe: Any, ready: Callable[..., Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    painted: list[str] = []
    plain = encode.generate

    def generate(pipe: Any, prompts: Any, **call: Any) -> Any:
        if len(painted) >= 2:
            raise KeyboardInterrupt
        painted.extend(prompts)
        return plain(pipe, prompts, **call)

    monkeypatch.setattr(encode, "PAINTED_AT_ONCE", 2)
    monkeypatch.setattr(encode, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        ready(unrelated_pictures=4)
    first = list(painted)
    painted.clear()
    material = ready(unrelated_pictures=4)
    assert len(first) == len(painted) == 2
    assert set(first).isdisjoint(painted)
    assert material.unrelated_captions == (*first, *painted)[:3] + ("",)


@pytest.mark.parametrize("own", [False, True], ids=["painted", "own"])
def test_prior_preservation_has_its_own_prompts_encoded(
    pipe: Any, ready: Callable[..., Material], own: bool, tmp_path: Path
) -> None:
    """Complaint: prior preservation encodes the wrong prompt. With and without a cache."""
    changes: dict[str, Any] = {"prior": 1.0}
    if own:
        (tmp_path / "toys").mkdir()
        Image.new("RGB", (64, 64), (1, 200, 3)).save(tmp_path / "toys/a.png")
        changes["unrelated_data"] = tmp_path / "toys"
    for _ in ("cold", "warm"):
        material = ready(**changes)
        assert len(material.unrelated_captions) == len(material.unrelated_latents) == 2 + own
        assert not any("kite" in caption for caption in material.unrelated_captions)
        assert (material.unrelated_captions[0] == "a toy") == own, "the class noun stands for a caption"
        for row, caption in enumerate(material.unrelated_captions):
            words = backbone_of(pipe).encode_prompts(pipe, [caption])
            for name, value in words.items():
                assert torch.equal(material.unrelated_conditioning[name][row : row + 1, : value.shape[1]], value)


# ------------------------------------------------------------------------------------- regularization pictures


def test_own_pictures_may_stand_instead_of_painted_ones(
    pipe: Any, ready: Callable[..., Material], tmp_path: Path
) -> None:
    toys = tmp_path / "toys"
    toys.mkdir()
    Image.new("RGB", (64, 64), (1, 200, 3)).save(toys / "a.png")
    (toys / "a.txt").write_text("a green toy")
    material = ready(unrelated_data=toys, unrelated_pictures=0)
    assert material.of_class.all(), "it says the class noun"
    pixels = to_tensor(open_picture(toys / "a.png"))[None]
    assert material.unrelated_captions == ("a green toy",)
    assert torch.equal(material.unrelated_latents, backbone_of(pipe).encode_pictures(pipe, pixels))
    before = material.beside
    (toys / "a.txt").write_text("a green thing")
    assert not ready(unrelated_data=toys, unrelated_pictures=0).of_class.any()
    assert ready(unrelated_data=toys, unrelated_pictures=0).beside != before
    (toys / "a.txt").write_text("a green kite")
    with pytest.raises(UserError, match="`unrelated_data` must not name the concept, but 1 of 1 captions do"):
        ready(unrelated_data=toys)
    with pytest.raises(UserError, match="`unrelated_pictures` must be at least 1, or 0 with `unrelated_data`, got 0"):
        dataclasses.replace(OPTIONS, unrelated_pictures=0)


# ------------------------------------------------------------------------------------------------- captions


def test_a_trigger_stands_in_front_where_it_lacked(ready: Callable[..., Material], data: Path) -> None:
    """Complaint: nobody knows which caption a picture has, and from where."""
    (data / "1.txt").write_text("a red thing")
    with pytest.raises(UserError, match=r"`concept` must stand in every caption, but 1 of 5 .* pass --trigger"):
        ready(gate=True)
    material = ready(trigger=True)
    told = [(sample.caption, sample.caption_source) for sample in material.scan.samples]
    assert told[:2] == [("kite number one", "sidecar"), ("kite, a red thing", "sidecar, 'kite' put in front")]
    assert material.captions[1] == "kite, a red thing"
    assert material.said == ("'kite' put in front of the 1 of 5 captions that lack it",)
    with pytest.raises(UserError, match="`trigger` puts the concept's name in front"):
        TrainOptions(trigger=True)


def test_dropout_takes_words_and_nothing_else(pipe: Any, ready: Callable[..., Material]) -> None:
    material = ready()
    dropped = 0
    for micro in range(20):
        plain, without = (batch(material, pipe, micro, caption_dropout=share) for share in (0.0, 0.5))
        assert torch.equal(plain.x, without.x)
        for row in range(len(plain.x)):
            same = [
                torch.equal(plain.conditioning[name][row], without.conditioning[name][row])
                for name in plain.conditioning
            ]
            if not all(same):
                assert row < 2, "unrelated pictures keep their words"
                for name, value in material.wordless.items():
                    assert torch.equal(without.conditioning[name][row, : value.shape[1]], value[0])
                dropped += 1
    assert 10 <= dropped <= 30
    every = batch(material, pipe, 0, caption_dropout=1.0)
    for name, value in material.wordless.items():
        assert torch.equal(every.conditioning[name][:2, : value.shape[1]], value.expand(2, *value.shape[1:]))


def test_words_that_reach_no_part_of_the_model_are_named(pipe: Any, ready: Callable[..., Material], data: Path) -> None:
    """Complaint: a caption's tail cut at the token limit."""

    def first_three(prompt: str) -> dict[str, Tensor]:
        letters = " ".join(prompt.split()[:3]).encode().ljust(60)
        return {"x": torch.tensor([list(letters)])}

    assert lost_words(first_three, "one two three four  five") == "four five"
    listed = lost_words(lambda prompt: {"x": [first_three(prompt)["x"]]}, "one two three four  five")
    assert listed == "four five", "Z-Image keeps a list"
    assert lost_words(first_three, "one two three four") == "four"
    assert lost_words(first_three, "one two three") == ""
    assert lost_words(first_three, "") == ""
    first_letters = lambda prompt: {"x": torch.tensor([list(prompt[:3].encode("utf-16-le").ljust(6))])}  # noqa: E731
    assert lost_words(first_letters, "a" * 50) == "a" * 47, "of a script without spaces"
    sky = [SimpleNamespace(caption="天" * 30), SimpleNamespace(caption="天" * 3)]
    assert cut_off(first_letters, sky) == {}, "no piece of it is as long as to be letters"
    assert cut_off(first_letters, [SimpleNamespace(caption="天" * 60)]) == {0: "天" * 57}  # type: ignore[list-item]
    caption = "kite " + "and a red house beside a small green clock " * 40
    (data / "0.txt").write_text(caption)
    (said,) = ready().said
    assert said.startswith(f"warning: the caption of {data / '0.png'} is longer than the base reads; lost: ")
    lost = said.partition("lost: ")[2]
    assert " ".join(caption.split()).endswith(lost)
    kept = caption.split()[: -len(lost.split())]
    encoder = backbone_of(pipe).encode_prompts
    full, part, less = (encoder(pipe, [" ".join(words)]) for words in (caption.split(), kept, kept[:-1]))
    assert all(torch.equal(full[name], part[name]) for name in full)
    assert not all(full[name].shape == less[name].shape and torch.equal(full[name], less[name]) for name in full)


# ------------------------------------------------------------------------------------------- sizes and views


def test_buckets_give_every_batch_one_size_and_every_picture_its_own(pipe: Any, ready: Callable[..., Material]) -> None:
    """Complaint: pictures deformed although cropping was off."""
    material = ready(buckets=True)
    sizes = {bucket.size: bucket.rows for bucket in material.buckets}
    assert sizes == {(64, 64): (0, 2), (48, 80): (1, 3), (80, 48): (4,)}
    assert material.said == ("sizes: 2 x 64x64, 2 x 48x80, 1 x 80x48",)
    seen_rows = Counter()  # type: ignore[var-annotated]
    for micro in range(10):
        found = batch(material, pipe, micro, buckets=True)
        (size,) = {size for size, rows in sizes.items() if found.rows[0] in rows}
        assert set(found.rows.tolist()) <= set(sizes[size])
        assert found.x.shape == (4, 4, size[1] // 8, size[0] // 8)
        assert found.masks.shape == (2, size[0] * size[1] // 64)
        seen_rows.update(found.rows.tolist())
    assert sum(seen_rows.values()) == 20
    assert min(seen_rows.values()) >= 3
    assert material.latents.shape == (5, 4, 8, 8), "measured on squares"


def test_without_any_of_it_there_is_one_bucket_of_the_pictures_themselves(ready: Callable[..., Material]) -> None:
    material = ready()
    (bucket,) = material.buckets
    assert (bucket.size, bucket.rows, bucket.weights) == ((64, 64), (0, 1, 2, 3, 4), None)
    assert material.latents.data_ptr() == bucket.latents.data_ptr()
    assert len(bucket.latents) == 1
    assert material.said == ()


def test_repeats_show_a_picture_more_often(pipe: Any, ready: Callable[..., Material], data: Path) -> None:
    (data / "metadata.jsonl").write_text('{"file_name": "3.png", "repeats": 4}\n')
    material = ready()
    assert len(material.items) == 8
    rows = [row for micro in range(8) for row in batch(material, pipe, micro).rows.tolist()]
    assert Counter(rows) == {0: 2, 1: 2, 2: 2, 3: 8, 4: 2}


def test_every_epoch_shows_another_view(pipe: Any, ready: Callable[..., Material]) -> None:
    material = ready(flip=True, batch_size=1)
    (bucket,) = material.buckets
    mirrored = to_tensor(seen(material.scan.samples[1], (64, 64), View(mirrored=True)))
    assert torch.equal(bucket.latents[1, 1], backbone_of(pipe).encode_pictures(pipe, mirrored[None])[0])
    rows, columns = 8, 8
    masks = bucket.masks.view(2, 5, rows, columns)
    assert torch.equal(masks[1], masks[0].flip(-1)), "the subject is where it is seen"
    for epoch in range(4):
        for place in range(5):
            found = batch(material, pipe, epoch * 5 + place, flip=True, batch_size=1)
            row = int(found.rows)
            near = [(clean(found)[0] - bucket.latents[n, row]).abs().max().item() < 1e-5 for n in (0, 1)]
            first = int(material.scan.samples[row].digest[:8], 16)
            assert near.index(True) == (epoch + first) % 2
            assert torch.equal(found.masks[0], bucket.masks[(epoch + first) % 2, row])


def test_no_more_views_are_made_than_epochs_come(ready: Callable[..., Material]) -> None:
    assert len(ready(crop=0.1).buckets[0].latents) == 8
    assert len(ready(crop=0.1, steps=5).buckets[0].latents) == 2
    assert len(ready(crop=0.1, flip=True, steps=1).buckets[0].latents) == 2, "some are cut in a single one"


# ---------------------------------------------------------------------------------------------- masked loss


def half_masks(data: Path) -> None:
    for path in sorted(data.glob("?.png")):
        size = open_picture(path).size
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(path.with_suffix(".mask.png"))


def test_masked_loss_weighs_the_subject(pipe: Any, ready: Callable[..., Material], data: Path) -> None:
    half_masks(data)
    material = ready(mask_loss=1.0)
    found = batch(material, pipe, 0, mask_loss=1.0)
    assert found.weight is not None
    assert found.weight.shape == (2, 1, 8, 8)
    assert found.weight[..., :3].min() > 0.97
    assert found.weight[..., 5:].max() < 0.03
    predicted = torch.zeros_like(found.target[:2])
    spoilt = predicted.clone()
    spoilt[..., 6:] += 1e3
    plain, masked = (objective.error(predicted, found.target[:2], w) for w in (None, found.weight))
    by_hand = (found.target[:2].square() * found.weight).sum() / (found.weight.sum() * 4)
    assert torch.allclose(masked, by_hand)
    assert not torch.allclose(masked, plain)
    assert torch.allclose(objective.error(predicted, found.target[:2], torch.ones(2, 1, 8, 8)), plain)
    assert material.weights is not None
    assert torch.equal(material.weights, material.buckets[0].weights[0])  # type: ignore[index]
    part = ready(mask_loss=0.25).buckets[0].weights
    assert part is not None
    assert part.min() == pytest.approx(0.75, abs=0.01)
    assert ready(mask_loss=1.0).said == (
        "masked loss: 5 pictures by their mask, 0 by their transparency, 0 count whole",
    )


def test_transparency_is_stated_and_can_be_left_out_of_the_loss(ready: Callable[..., Material], data: Path) -> None:
    """Complaint: a transparent background becomes a flat colour and is learned."""
    picture = open_picture(data / "0.png").convert("RGBA")
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (32, 0, 64, 64))
    picture.putalpha(alpha)
    picture.save(data / "0.png")
    assert ready().said == ("1 of 5 pictures are partly transparent: white lies under them",)
    material = ready(mask_loss=1.0)
    weights = material.buckets[0].weights
    assert weights is not None
    assert weights[0, 0, ..., 5:].max() < 0.03, "0 where clear"
    assert weights[0, 1:].min() == 1, "the others count whole"
    assert material.said[1] == "masked loss: 0 pictures by their mask, 1 by their transparency, 4 count whole"
    assert [sample.clear for sample in material.scan.samples] == [True, False, False, False, False]


def test_masks_that_say_nothing_are_told(ready: Callable[..., Material], data: Path) -> None:
    with pytest.raises(UserError, match="`mask_loss` needs masks"):
        ready(mask_loss=1.0)
    Image.new("L", (64, 64), 0).save(data / "0.mask.png")
    with pytest.raises(UserError, match=r"0\.mask\.png marks nothing as the subject"):
        ready(mask_loss=1.0)


def test_masks_follow_their_views(ready: Callable[..., Material], data: Path) -> None:
    half_masks(data)
    bucket = ready(mask_loss=1.0, flip=True).buckets[0]
    assert bucket.weights is not None
    assert bucket.masks.shape == (2, 5, 64)
    assert torch.allclose(bucket.weights[1], bucket.weights[0].flip(-1), atol=1e-6)
    assert torch.allclose(bucket.masks[1].view(5, 8, 8), bucket.masks[0].view(5, 8, 8).flip(-1), atol=1e-6)


# -------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"caption_dropout": 1.5}, "`caption_dropout` must be a share between 0 and 1, got 1.5"),
        ({"mask_loss": -1.0}, "`mask_loss` must be a share between 0 and 1, got -1"),
        ({"crop": 0.9}, r"`crop` must be a share between 0 and 0\.5, got 0\.9"),
        ({"crop": float("nan")}, "`crop` must be a share"),
    ],
)
def test_options_that_cannot_work_name_their_field(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrainOptions(**changes)


def test_new_options_are_off_and_survive_json(tmp_path: Path) -> None:
    """Stored cells of the benchmark are named by `essence`: what is off must not change it."""
    new = {"caption_extension", "caption_column", "trigger", "caption_dropout", "buckets", "flip", "crop", "mask_loss"}
    new |= {"unrelated_data", "skip_broken", "follow_links", "max_pixels"}
    assert not new & set(TrainOptions().essence())
    options = TrainOptions(concept="x", trigger=True, crop=0.1, unrelated_data=tmp_path, max_pixels=5)
    assert TrainOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    "changes",
    [
        {"buckets": True, "flip": True, "crop": 0.1, "mask_loss": 0.5, "inner": 0.1, "caption_dropout": 0.2},
        {"data_start": True},
        {"data_start": True, "buckets": True, "flip": True},
    ],
    ids=["everything", "data-start", "data-start-buckets"],
)
def test_a_run_with_all_of_it_trains(pipe: Any, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    half_masks(data)
    options = dataclasses.replace(OPTIONS, steps=2, n_atoms=2, sites=("layers.0.attn.to_q",), gate=True, **changes)
    adapter = atomtune.train(pipe, data, tmp_path / "runs" / "a", options, progress=False)
    assert len(adapter.atoms) == 2
    adapter.remove()


def test_fitted_pictures_keep_their_proportions(data: Path) -> None:
    picture = open_picture(data / "4.png")
    assert fit(picture, (80, 48)).size == (80, 48)


def test_atoms_leave_the_key_of_a_base_as_it_is(shared: Any) -> None:
    """Wherever they are attached: what the base painted beside other sites is found again."""
    before = encode.weights_key(shared.transformer)
    attach_atoms(shared, backbone_of(shared), dataclasses.replace(OPTIONS, sites=("to_q",)))
    inside = encode.weights_key(shared.transformer)
    remove_adapter(shared.transformer)
    assert inside == before == encode.weights_key(shared.transformer)
