"""Place models on one GPU, on several, and partly in host memory: the choice, the figures."""

import re
from types import SimpleNamespace
from unittest.mock import patch

import accelerate
import psutil
import pytest
import torch
from conftest import LABELS, make_small, run_all, vary
from test_speed import labs, load, load_plain, models, packed_linears  # noqa: F401

import quant_lab

BASE, FP8, W4A16, W8A8 = LABELS
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
QUALITY = "perplexity", "perplexity_ratio", "window_losses", "kld", "top1_agreement", "divergence"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A random Qwen2 of eight layers in float16, its head apart from its embedding."""
    folder = make_small(tmp_path_factory.mktemp("deep"), hidden=128, num_hidden_layers=8,
                        tie_word_embeddings=False)
    return quant_lab.place_model(folder, quant_lab.Options(), CPU)


def reckon_room(model, window):
    """Return bytes beside a model: 128 tokens' logits in float32 six times, a head, a window.

    The reference's head comes with its embedding. For each token of the window, 64 numbers
    as wide as the hidden states.
    """
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    return vocabulary * (128 * 6 * 4 + 2 * 2 * width) + window * width * 64 * 2


def map_devices(model, free, **changes):
    """Return the device map where so many bytes are free on each GPU, and which were asked."""
    asked = []

    def find_free(gpu):
        asked.append(gpu)
        return free[gpu]

    options = quant_lab.Options(window=64, **changes)
    with (patch.object(quant_lab, "find_free", find_free),
          patch.object(torch.cuda, "device_count", lambda: len(free)),
          patch.object(accelerate.utils.modeling, "get_max_memory", dict)):
        return quant_lab.map_devices(model, options), sorted(set(asked))


def held(model, device_map):
    """Return bytes of a model's parameters by device; each has to have one."""
    sizes = {}
    for name, x in model.named_parameters():
        device, = [place for part, place in device_map.items()
                   if not part or f"{name}.".startswith(f"{part}.")]
        sizes[device] = sizes.get(device, 0) + x.nbytes
    return sizes


def test_a_model_goes_whole_to_the_first_gpu_that_holds_a_window_beside_it(deep):
    size, room = deep.get_memory_footprint(), reckon_room(deep, 64)
    assert map_devices(deep, [size + room, 10**12]) == ({"": 0}, [0]), "no other is touched"
    spread, asked = map_devices(deep, [size + room - 1, 10**12])
    assert set(spread.values()) == {0, 1} and asked == [0, 1]


@pytest.mark.parametrize("shares, changes, wanted", [
    ((0.7, 0.7, 0.7), {}, {0, 1}), ((0.6, 0.3, 0.6), {}, {0, 1, 2}),
    ((0.7, 0.7), dict(gpus=2), {0, 1}), ((0.7, 0.7), dict(gpus=1), {0, "cpu"}),
    ((0.7, 0.7), dict(gpus=9), {0, 1}), ((0.7,), {}, {0, "cpu"}),
    ((0.5, 0.2), {}, {0, 1, "cpu"}), ((0.01,), {}, {"cpu"})])
def test_a_larger_one_takes_as_many_as_it_needs_then_host_memory(deep, shares, changes, wanted):
    size, room = deep.get_memory_footprint(), reckon_room(deep, 64)
    free = [int(share * size) + room for share in shares]
    device_map, _ = map_devices(deep, free, **changes)
    assert set(device_map.values()) == wanted
    for device, bytes_there in held(deep, device_map).items():
        assert device == "cpu" or bytes_there <= free[device] - room
    layers = [name for name in device_map if re.search(r"layers\.\d+\.", name)]
    assert not layers, "a layer is not divided"


def test_of_one_model_the_reference_may_take_two_and_a_checkpoint_one(models):  # noqa: F811
    dense, packed = (load(models[label, False], True) for label in (BASE, "rtn_w4a16"))
    free = [packed.get_memory_footprint() + reckon_room(packed, 64)] * 2
    assert dense.get_memory_footprint() > packed.get_memory_footprint()
    assert set(map_devices(dense, free)[0].values()) == {0, 1}
    assert map_devices(packed, free)[0] == {"": 0}


def test_what_is_free_heeds_others_and_the_limit_of_this_process(monkeypatch):
    for name, found in dict(mem_get_info=lambda gpu: (70 - gpu, 100),
                            get_per_process_memory_fraction=lambda gpu: (1.0, 0.5)[gpu]).items():
        monkeypatch.setattr(torch.cuda, name, found)
    assert [quant_lab.find_free(gpu) for gpu in (0, 1)] == [70, 50]


@pytest.mark.parametrize("label", [BASE, FP8, "rtn_w4a16", W8A8])
@torch.no_grad()
def test_packed_linears_run_where_accelerate_keeps_their_weights(
        models, tmp_path, label):  # noqa: F811
    """On a CPU what does not fit waits on disk, by the very hooks that serve host memory."""
    model = load(models[label, True], True, (7, 5) if label == BASE else (0, 0))
    ids = torch.arange(5, 45)[None]
    wanted, count = model(ids).logits, len(packed_linears(model))
    device_map = {name: "disk" if ".layers." in name else "cpu" for name in (
        "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head",
        *(f"model.layers.{n}" for n in range(len(model.model.layers))))}
    with patch.object(torch.cuda, "device_count", lambda: 0):
        accelerate.dispatch_model(model, device_map, "cpu", offload_dir=tmp_path)
    assert any(x.is_meta for x in model.model.layers.parameters()) and count
    assert torch.equal(model(ids).logits, wanted)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(x.is_meta for x in model.parameters())


def test_what_is_spread_says_where_and_what_is_copied(models, monkeypatch, capfd):  # noqa: F811
    seen, sizes = {}, []

    def dispatch(model, device_map, main_device):
        seen.update(map=device_map, main=main_device, forwards={
            linear.forward.func for linear in packed_linears(model)})
        sizes.append(sum(x.nbytes for x in model.model.layers[1].parameters()))
        model.model.layers[1].to("meta")

    place = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": "cpu"}
    monkeypatch.setattr(quant_lab, "OUTPUT", __import__("sys").stdout)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(quant_lab, "map_devices", lambda *_: place)
    monkeypatch.setattr(accelerate, "dispatch_model", dispatch)
    model = quant_lab.place_model(models["rtn_w4a16", True], quant_lab.Options(), GPU)
    assert seen == dict(map=place, main=0, forwards={quant_lab.forward_there})
    assert model.devices == [0, 1, "cpu"]
    assert f"on [0, 1, 'cpu'], {sizes[0] / 1e9:.1f} GB copied for each window and token" in (
        capfd.readouterr().out)


def test_rows_say_which_devices_they_used(lab):
    results = run_all(lab("--variants", FP8))
    assert results["machine"]["gpus"] == []
    assert [row["gpus"] for row in results["variants"]] == [
        dict(quality=["cpu"], speed=["cpu"])] * 2


def test_what_fits_no_gpu_whole_has_quality_and_no_speed(lab, monkeypatch):
    place = quant_lab.place_model

    def lack(folder, options, device, whole=False):
        if whole and folder.name == FP8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
        return place(folder, options, device)

    monkeypatch.setattr(quant_lab, "place_model", lack)
    base, row = run_all(lab("--variants", FP8))["variants"]
    assert row["status"] == "ok" and row["perplexity"] > 1 and row["kld"]["mean"] > 0
    assert row["runs_as"].startswith("speed was not measured: OutOfMemoryError: CUDA out of mem")
    assert row["ttft_s"] is row["latency_s"] is row["decode"] is None
    assert base["gpus"]["speed"] and row["gpus"]["speed"] == []


def test_a_model_larger_than_host_memory_is_refused(small, monkeypatch, capsys):
    size = sum(x.numel() for x in load_plain(small).parameters())
    for dtype, bytes_each in dict(float16=2, float32=4).items():
        options = quant_lab.Options(model=str(small), dtype=dtype)
        for free, is_refused in ((bytes_each * size + 10_000, False),
                                 (bytes_each * size - 1, True)):
            monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
            if not is_refused:
                assert quant_lab.open_model(options)[0] == small
                continue
            with pytest.raises(SystemExit) as end:
                quant_lab.open_model(options)
            assert end.value.code == 2
            assert re.search(rf"--model {small}: [\d.]+ GB of RAM, [\d.]+ are free; give "
                             "another", capsys.readouterr().err)


@pytest.mark.parametrize("keys, mine, wanted", [
    (("latency_s", "ttft_s"), 1, 0.5), (("latency_s", "ttft_s"), 2, 0),
    (("weight_bytes",), 2, 0.5), (("weight_bytes",), None, 0.5)])
def test_times_on_unequal_numbers_of_gpus_have_no_ratio(keys, mine, wanted):
    def row(scale, count):
        x = dict(median=scale, min=scale, max=scale, samples=[scale])
        return quant_lab.ROW | dict(label="x", status="ok", latency_s=x, ttft_s=x,
                                    weight_bytes=scale, tensor_parallel_size=count)

    for key in keys:
        assert quant_lab.relate(row(1.0, mine), row(2.0, 1), key) == wanted


@pytest.fixture
def halves(labs):  # noqa: F811
    """Return a function that gives a GPU lab's figures of a checkpoint, whole or spread."""
    lab = vary(labs[False], device=GPU)
    lab.reference = quant_lab.measure_reference(lab)

    def measure(folder, devices):
        def spread(model, options):
            layers = [f"model.layers.{n}" for n in range(len(model.model.layers))]
            names = ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]
            places = [devices[n * len(devices) // len(layers)] for n in range(len(layers))]
            return dict(zip(names, [devices[0], *places, devices[-1], 0, devices[-1]]))

        with patch.object(quant_lab, "map_devices", spread if len(devices) > 1 else
                          lambda *_: {"": 0}):
            again = quant_lab.measure_reference(lab)
            model = quant_lab.place_model(folder, lab.options, GPU)
            assert model.devices == list(devices)
            return quant_lab.measure_quality(model, lab), again

    return measure


@pytest.mark.gpu
@pytest.mark.parametrize("label", [BASE, FP8, "rtn_w4a16", W8A8])
@pytest.mark.parametrize("devices", [(0, "cpu"), ("cpu", 0), (0, 1), (1, 0), (0, 1, "cpu")])
def test_figures_of_quality_are_the_same_wherever_the_weights_are(
        models, halves, label, devices):  # noqa: F811
    if 1 in devices and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    folder = models[label, False]
    (wanted, reference), (found, again) = halves(folder, (0,)), halves(folder, devices)
    for key in QUALITY:
        assert found[key] == wanted[key], key
    assert torch.equal(again.losses, reference.losses)
    assert again.completions == reference.completions
    assert again.head.get_memory_footprint() == reference.head.get_memory_footprint()
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_a_window_takes_no_more_room_than_reckoned(tmp_path):
    """Of the real vocabulary, in each format's way; the reference's head lies beside."""
    from test_figures import place_lab

    folder = make_small(tmp_path, hidden=512, vocab_size=151_936, intermediate_size=2560)
    lab = place_lab(folder, torch.arange(4096), window=2048, new_tokens=2, dtype="float16")
    lab.device = GPU
    lab.reference = quant_lab.measure_reference(lab)
    model = quant_lab.place_model(folder, lab.options, GPU)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quant_lab.measure_quality(model, lab)
    assert torch.cuda.max_memory_allocated() - before < reckon_room(model, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["packed", "emulated"])
def test_where_a_gpu_lacks_room_the_figures_of_all_rows_stay(
        lab, tmp_path, monkeypatch, execution):
    """Leave the first GPU 2,000 bytes too few for the model."""
    folder = make_small(tmp_path / "deep", hidden=128, num_hidden_layers=8)
    words = ("--model", folder, "--variants", FP8, W8A8, "rtn_w4a16", "--device", "cuda",
             "--no-compile", "--gpus", 1, "--execution", execution)
    whole = run_all(lab(*words))["variants"]
    build = lab(*words, "--fresh")
    model = quant_lab.place_model(build.model_folder, build.options, CPU)
    need = reckon_room(model, build.options.window) + model.get_memory_footprint()
    monkeypatch.setattr(quant_lab, "find_free", lambda _: need - 2000)
    spread = run_all(build)["variants"]
    for one, other in zip(whole, spread):
        for key in QUALITY:
            assert one[key] == other[key], key
    assert [row["gpus"]["quality"] for row in spread][:: 2 if execution == "packed" else 1] == (
        [[0, "cpu"], [0]] if execution == "packed" else [[0, "cpu"]] * 4)
    assert [row["gpus"]["speed"] for row in whole] == [[0]] * 4
