"""Losses, gradients, weights and averages at every ZeRO stage, on one and two ranks, against one plain process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.parity]

PROGRAM = Path(__file__).with_name("ranks_program.py")
SMALL_LITE = {f"{part}_channels": 8 for part in ("extraction", "aggregation", "decoder")}
SMALL_LITE |= {f"{part}_multipliers": [1] for part in ("extraction", "aggregation")}
SHARED = {
    "losses": {"perceptual": "none"},
    "gan": {"start_step": 0, "learning_rate": 2e-5, "discriminator": {"base_channels": 8, "num_layers": 2}},
    "optimizer": {"learning_rate": 2e-5, "warmup_steps": 0},
}
VIDEO = {
    "model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
    | {"decoder_norm": "smc"},
    "data": {"num_frames": 5, "resolution": [32, 32]},
    **SHARED,
}
IMAGE = {
    # Small rates and no norms, before which biases have gradients of nothing but rounding, that Adam would blow up.
    "model": {**SMALL_LITE, "num_res_blocks": 1, "encoder_norm": "smc", "decoder_norm": "smc"},
    **SHARED,
    "losses": {"perceptual": "none", "wavelet": 0.5, "gaussian": 0.5},
}
PHASES = [
    {"resolution": 16, "steps": 2, "batch": 4, "micro_batch": 2},
    {"resolution": 24, "steps": 2, "batch": 8, "micro_batch": 1},
]
ADAPTIVE = {**IMAGE, "gan": {**IMAGE["gan"], "weighting": "adaptive"}, "data": {"resolution": 16}}
RECOMPUTED = {"activation_checkpointing": True}
DECODER_ONLY = ["encoder.*", "bottleneck.phi", "logvar.*"]
JOINT = {
    **VIDEO,
    "data": {"sources": ["clips", {"path": "images", "kind": "images"}], "buckets": ["5x32x32", "1x48x48", "9x16x24"]},
}
DECODER_LATER = [{"steps": 2}, {"steps": 2, "freeze": ["encoder.*", "logvar.*"]}]
STAGES = (0, 1, 2, 3)
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
CASES = {  # name: kind, steps, configuration, training block
    "video": ("video", 3, VIDEO, {"batch_size": 4, "micro_batch_size": 1}),
    "joint": ("video", 6, JOINT, {"tokens_per_batch": 80, "batch_multiple": 2, "tokens_per_micro_batch": 40}),
    "decoder": ("video", 4, {**VIDEO, "phases": DECODER_LATER}, {"batch_size": 4}),
    "phases": ("image", 4, {**IMAGE, "phases": PHASES}, {}),
    "adaptive": ("image", 2, ADAPTIVE, {"batch_size": 4}),
    "recomputed": ("image", 2, IMAGE | {"data": {"resolution": 16}}, {"batch_size": 4} | RECOMPUTED),
    "frozen": ("video", 2, VIDEO, {"batch_size": 4, "freeze": DECODER_ONLY} | RECOMPUTED),
}


def cases(stages):
    """One case for each entry above, plain if `stages` is false, else for each of its stages."""
    made = {}
    for name, (kind, steps, config, training) in CASES.items():
        for stage in STAGES if stages else [None]:
            engine = {"engine": "plain" if stage is None else "deepspeed", "gradient_clipping": 0.0}
            tree = {**config, "training": {**training, **engine}}
            if stage is not None:
                # Small weights stay whole on every rank under ZeRO-3 unless the threshold says otherwise.
                zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
                tree["deepspeed"] = {"zero_optimization": zero}
            made[name if stage is None else f"{name}-{stage}"] = {"kind": kind, "steps": steps, "config": tree}
    return made


def half_cases():
    """Small video models in bfloat16 at every stage, each with the case whose losses they come close to."""
    made = {}
    for stage in STAGES:
        tree = {**VIDEO, "training": {"batch_size": 4, "micro_batch_size": 1, "engine": "deepspeed"}}
        tree["deepspeed"] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        made[f"half-{stage}"] = {"kind": "video", "steps": 3, "config": tree}
    return made


def image_cases():
    """Image models in bfloat16, with every discriminator and the losses that look at more than their own network."""
    base = {**ADAPTIVE, "losses": {"perceptual": "none", "ldl": 0.5}}
    made = {}
    for stage, kind in ((0, "unet"), (1, "patch"), (2, "stylegan"), (3, "unet")):
        tree = {**base, "gan": {**base["gan"], "discriminator": {"kind": kind, "base_channels": 8, "num_layers": 2}}}
        tree["training"] = {"engine": "deepspeed", "batch_size": 4}
        tree["deepspeed"] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        made[f"bf16-{kind}-{stage}"] = {"kind": "image", "steps": 3, "config": tree}
    return made


# A gradient in the very first step, the discriminator alone, and a loss; in two passes a step.
BAD = {"0": "gradient", "2": "discriminator", "3": "loss"}


def bad_cases(stages):
    """Small video models with steps that are not finite: plain if `stages` is empty, else at each, in both types."""
    training = {"batch_size": 4, "micro_batch_size": 1, "engine": "deepspeed" if stages else "plain"}
    case = {"kind": "video", "steps": 5, "bad": BAD, "config": {**VIDEO, "training": training}}
    if not stages:
        return {"bad": case}
    settings = {}
    for stage in stages:
        for name, bf16 in (("float32", False), ("bf16", True)):
            settings[f"bad-{stage}-{name}"] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    for stage in (2, 3):
        settings[f"bad-{stage}-offloaded"] = {"zero_optimization": {"stage": stage, **OFFLOADED}}
    # Gradients summed in float32 beside weights in bfloat16, for which DeepSpeed takes another optimizer.
    settings["bad-1-bf16-summed"] = {**settings["bad-1-bf16"], "data_types": {"grad_accum_dtype": "fp32"}}
    return {name: {**case, "config": {**case["config"], "deepspeed": each}} for name, each in settings.items()}


def compiled_case(stage):
    """Two steps of clips."""
    engine = {"engine": "plain"} if stage is None else {"engine": "deepspeed"}
    tree = {**VIDEO, "training": {"batch_size": 2, "compile": stage is not None, **engine}}
    return {"kind": "video", "steps": 2, "config": {**tree, "deepspeed": {"zero_optimization": {"stage": stage or 0}}}}


def offloaded_cases():
    """Joint training with optimizer states on the host."""
    made = {}
    for stage in (1, 2, 3):
        case = made[f"offloaded-{stage}"] = cases(stages=True)[f"joint-{stage}"]
        case["config"]["deepspeed"]["zero_optimization"] |= OFFLOADED
    return made


def resume_cases(folder, ranks, loads_of=None):
    """Runs of six steps that write a checkpoint after two (or, loading that of other ranks, after four)."""
    made = {}
    for stage, bf16 in [(stage, False) for stage in STAGES] + [(1, True), (2, True), (3, True)]:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        tree = {**VIDEO, "training": {"batch_size": 4, "micro_batch_size": 2, "engine": "deepspeed"}}
        tree["deepspeed"] = {"zero_optimization": zero, "bf16": {"enabled": bf16}}
        name = f"resume-{stage}{'-bf16' * bf16}"
        case = {"kind": "video", "steps": 6, "config": tree, "save": str(folder / f"{name}-{ranks}")}
        if loads_of:
            case |= {"load": str(folder / f"{name}-{loads_of}" / f"step_{2 if ranks == 1 else 4:08d}")}
        made[name] = {**case, "save_after": 4 if loads_of else 2}
    return made


def run(folder, name, tree, ranks):
    cases_file, output = folder / f"{name}.json", folder / f"{name}.safetensors"
    cases_file.write_text(json.dumps(tree))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(PROGRAM), str(cases_file), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The results of one plain process, for comparison."""
    tree = cases(stages=False) | {"compiled": compiled_case(None)} | bad_cases([])
    return run(tmp_path_factory.mktemp("plain"), "plain", tree, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of the checkpoints to resume from."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, saved):
    """All cases on two ranks except those that resume from a checkpoint; starting ranks takes longer than a case."""
    tree = cases(stages=True) | offloaded_cases() | bad_cases(STAGES) | half_cases() | image_cases()
    return run(tmp_path_factory.mktemp("ranks"), "ranks", tree | resume_cases(saved, "2"), 2)


def part(tensors, case, kind):
    return {name: value for name, value in tensors.items() if name.startswith(f"{case}.{kind}")}


def distance(ours, theirs, case, reference):
    """Norm of the difference over the norm, all tensors together."""
    pairs = [(value, theirs[name.replace(case, reference, 1)]) for name, value in ours.items()]
    difference = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return (difference / sum(b.double().square().sum() for _, b in pairs)).sqrt().item()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    tree = cases(stages=True) | {"compiled-2": compiled_case(2)}
    return run(tmp_path_factory.mktemp("rank"), "rank", tree, 1)


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_every_zero_stage_equals_one_plain_process(plain, request, ranks):
    tensors = request.getfixturevalue(ranks)
    found = {}
    for case in cases(stages=True):
        reference = case.partition("-")[0]
        kinds = ["logs", "gradients.vae", "gradients.discriminator", "weights.vae", "average"]
        for kind in kinds:
            ours, theirs = part(tensors, case, kind), part(plain, reference, kind)
            assert {name.replace(case, reference, 1) for name in ours} == set(theirs)
            assert ours
            found[case, kind] = distance(ours, theirs, case, reference)
    assert {key: value for key, value in found.items() if not value < 1e-5} == {}, found


def test_compiled_training_equals_plain_training(plain, one_rank):
    for kind in ("logs", "gradients.vae", "weights.vae", "average"):
        ours, theirs = part(one_rank, "compiled-2", kind), part(plain, "compiled", kind)
        assert distance(ours, theirs, "compiled-2", "compiled") < 1e-5, kind


def test_offloaded_optimizers_equal_one_plain_process(plain, two_ranks):
    for case in offloaded_cases():
        for kind in ("logs", "weights.vae", "average"):
            ours, theirs = part(two_ranks, case, kind), part(plain, "joint", kind)
            assert distance(ours, theirs, case, "joint") < 1e-5, (case, kind)


def test_steps_that_are_not_finite_on_one_rank_change_nothing_on_any(plain, two_ranks):
    for case in bad_cases(STAGES):
        changed = [part(two_ranks, case, f"changed.{step}")[f"{case}.changed.{step}"].tolist() for step in BAD]
        assert changed == [[0, 0]] * len(BAD), case
        kinds = {kind: (part(two_ranks, case, kind), part(plain, "bad", kind)) for kind in ("weights", "average")}
        found = {kind: distance(*tensors, case, "bad") for kind, tensors in kinds.items()}
        assert max(found.values()) < (1e-5 if "bf16" not in case else 1e-2), (case, found)


def test_runs_go_on_with_another_number_of_ranks(two_ranks, saved, tmp_path):
    fewer = run(tmp_path, "fewer", resume_cases(saved, 1, loads_of="2"), 1)
    more = run(tmp_path, "more", resume_cases(saved, 2, loads_of="1"), 2)
    found = {}
    for case in resume_cases(saved, 2):
        # Going back in a running process, as a roll-back does, gives the same again.
        for step in range(2, 6):
            first, again = part(two_ranks, case, f"logs.{step}"), part(two_ranks, case, f"again.{step}")
            assert {name.replace("again", "logs"): value for name, value in again.items()} == first, (case, step)
        for name, resumed, first in (("fewer", fewer, 2), ("more", more, 4)):
            for kind in (*(f"logs.{step}" for step in range(first, 6)), "weights", "average"):
                ours, theirs = part(resumed, case, kind), part(two_ranks, case, kind)
                assert set(ours) == set(theirs)
                found[case, name, kind] = distance(ours, theirs, case, case)
    # In bfloat16 each rank rounds what it sums.
    assert {key: value for key, value in found.items() if not value < (1e-2 if "bf16" in key[0] else 1e-5)} == {}


def test_losses_in_bfloat16_are_close_to_those_in_float32(plain, two_ranks):
    for case in half_cases():
        losses = part(two_ranks, case, "logs")
        assert losses
        for name, value in losses.items():
            if name.endswith(".loss"):
                assert value.item() == pytest.approx(plain[name.replace(case, "video", 1)].item(), rel=0.05), name


def test_image_models_train_in_bfloat16(two_ranks):
    for case in image_cases():
        assert all(value.isfinite().all() for value in part(two_ranks, case, "").values())
        logs = {name.rpartition(".")[2] for name in part(two_ranks, case, "logs.0")}
        assert {"ldl", "adaptive_weight", "gradient_ratio", "discriminator"} <= logs
        # The averaged weights are those of the optimizer, in full precision.
        assert any((v != v.bfloat16().float()).any() for v in part(two_ranks, case, "average").values())


def test_a_weight_that_is_wrong_would_be_noticed(plain):
    """The measure above sees a change of a hundredth of a percent in one small tensor."""
    ours = part(plain, "video", "average")
    changed = {name: value.clone() for name, value in ours.items()}
    name = min(changed, key=lambda key: changed[key].numel() if changed[key].any() else torch.inf)
    changed[name] *= 1.01
    assert distance(changed, ours, "video", "video") > 1e-5
