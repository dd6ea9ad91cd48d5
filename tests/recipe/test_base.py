"""Recipes over bases: what holds, where it comes from, what is dropped, and what is refused."""

import re
import tomllib
from pathlib import Path

import pytest
from toy import toy_config

from adagrpo.cli import main
from adagrpo.recipe.dotted import lookup
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import annotated, load_recipe, read_recipe, recipe_names, to_toml

PLUGIN = "[model]\nfamily = 'parts:model'\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(**texts: str) -> None:
        for name, text in texts.items():
            Path(f"{name}.toml").write_text(text, "utf-8")

    return write


def refusal(recipe: str, *options: str, capsys) -> str:
    """The one line of an input error, behind the notice if there is one."""
    assert main(["train", recipe, "--dry-run", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines] in (["adagr"], ["note:", "adagr"])
    return lines[-1]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "flux1-dev-fast",
            {
                "name": "flux1-dev-fast", "selection.probe": "memory", "model.tuning": "lora", "optimizer.lr": 1e-4,
                "model.path": "black-forest-labs/FLUX.1-dev", "rollout.sde_steps": (0, 2, 4, 6), "rollout.group_size": 12,
                "engine.max_rows": 48, "data.prompts": "prompts.txt", "rewards.0.name": "pickscore", "loss.old_logp": "rollout",
            },
        ),
        ("flux1-dev-lora", {"model.lora_rank": 64, "selection.probe": "full", "optimizer.lr": 1e-4, "model.height": 512}),
        (
            "flux1-dev-official",
            {
                "model.tuning": "full", "model.timestep": "bf16", "rollout.fork_velocity": "probe", "loss.old_logp": "detached",
                "loss.average": "iteration", "train.steps_per_iteration": 4, "optimizer.lr": 2e-6, "rollout.storage": "bf16",
            },
        ),
        (
            "flux1-dev-official-lora",
            {
                "model.tuning": "lora", "model.timestep": "bf16", "rollout.fork_velocity": "probe", "optimizer.lr": 1e-4,
                "loss.average": "update", "train.steps_per_iteration": 1, "model.lora_alpha": 128.0,
            },
        ),
        ("tiny-grpo", {"selection.candidates": 1, "advantage.weight": 0.0, "rollout.eta": 1.0, "train.slots": 12}),
        ("tiny-dapo", {"selection.candidates": 1, "advantage.weight": 0.0, "advantage.equal_groups": "refill"}),
    ],
)  # fmt: skip
def test_shipped_recipes_over_bases_hold_what_they_held_alone(name: str, keys: dict) -> None:
    config = load_recipe(name)
    assert {key: lookup(config, key) for key in keys} == keys


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_drop_nothing_and_print_themselves_whole(name: str, tmp_path) -> None:
    recipe = read_recipe(name)
    printed = annotated(recipe)
    assert recipe.notice == "" and tomllib.loads(printed) == tomllib.loads(to_toml(recipe.config))
    outside = re.sub(
        r"(?m)^(\[\S+\.kwargs\].*)\n(?:.+\n)*", r"kwargs = \1\n", printed
    )  # their origin stands behind the heading
    values = [line for line in outside.splitlines() if re.match(r"\w+ = ", line)]
    assert len(values) > 100 and all(re.search(r"  # (default|this recipe|base [\w-]+)$", line) for line in values)
    (tmp_path / "again.toml").write_text(printed, "utf-8")
    again = read_recipe(tmp_path / "again.toml")
    assert again.config == recipe.config and {layer.label for layer in again.origins.values()} == {"this recipe"}


def test_tables_merge_and_lists_arguments_and_rewards_replace(files) -> None:
    files(
        low="""
            name = "low"
            [model]
            family = "parts:model"
            kwargs = {a = 1, b = 2}
            [rollout]
            sde_steps = [0, 1, 2]
            steps = 9
            [guards.grad_norm]
            limit = 3.0
            patience = 4
            [[rewards]]
            name = "parts:reward"
            weight = 2.0
            kwargs = {c = 3}
            [[rewards]]
            name = "brightness"
            """,
        top="""
            base = "low.toml"
            [model]
            kwargs = {b = 5}
            [rollout]
            sde_steps = [1]
            [guards.grad_norm]
            action = "stop"
            [[rewards]]
            name = "tiny"
            """,
    )
    recipe = read_recipe("top.toml")
    c = recipe.config
    assert c.name == "low" and c.model.family == "parts:model" and c.rollout.steps == 9
    assert c.rollout.sde_steps == (1,) and c.model.kwargs == {"b": 5} and c.rewards == (RewardConfig("tiny"),)
    assert (c.guards.grad_norm.limit, c.guards.grad_norm.action, c.guards.grad_norm.patience) == (3.0, "stop", 4)
    origins = ("rollout.steps", "rollout.eta", "rollout.sde_steps", "guards.grad_norm.limit", "guards.grad_norm.action")
    assert [recipe.origin(key) for key in origins] == [
        "base low.toml", "default", "this recipe", "base low.toml", "this recipe"
    ]  # fmt: skip
    assert [recipe.origin(f"rewards.0.{key}") for key in ("name", "weight", "kwargs")] == ["this recipe", "default", "default"]


def test_the_command_line_is_an_origin_of_its_own(files, capsys) -> None:
    files(mine="base = 'flux1-dev-fast'\nname = 'mine'\n[train]\nslots = 2\n")
    options = ["--optimizer.lr", "1e-4", "--selection.allow-unseen", "--output.no-keep-best", "--rewards.0.weight=0.5"]
    assert main(["train", "mine.toml", "--print-config", "--rollout.sde_steps", "0", "2", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for line in (
        'name = "mine"  # this recipe', "slots = 2  # this recipe", 'probe = "memory"  # base flux1-dev-fast',
        'tuning = "lora"  # base flux1-dev-lora', "steps = 16  # base flux1-dev", "seed = 0  # default",
        "lr = 0.0001  # command line", "allow_unseen = true  # command line", "keep_best = false  # command line",
        "sde_steps = [  # command line", "[model.kwargs]  # default", 'name = "pickscore"  # base flux1-dev',
        "weight = 0.5  # command line", "timeout = 600.0  # default",
    ):  # fmt: skip
        assert line in printed.out.splitlines(), line
    files(again=printed.out)
    assert load_recipe("again.toml").rewards == (RewardConfig("pickscore", weight=0.5),)


def test_bases_are_found_beside_the_file_that_names_them(tmp_path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "low.toml").write_text("base = 'tiny'\n[train]\nseed = 5\n", "utf-8")
    (tmp_path / "deep" / "er" / "mid.toml").write_text("base = '../low.toml'\n[train]\nslots = 7\n", "utf-8")
    (tmp_path / "top.toml").write_text(f"base = '{tmp_path}/deep/er/mid.toml'\n", "utf-8")
    config = load_recipe(tmp_path / "top.toml")
    assert (config.train.seed, config.train.slots, config.train.iterations) == (5, 7, 120)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"a": "base = 'tinny'"}, ["a.toml: base = 'tinny': no recipe", "did you mean tiny?", "or a TOML file relative to ."]),
        ({"a": "base = 'b.toml'"}, ["a.toml: base = 'b.toml': no recipe 'b.toml'"]),
        ({"a": "base = 3"}, ["a.toml: base = 3: expected the name of a recipe"]),
        ({"a": "base = ['tiny', 'tiny-grpo']"}, ["a.toml: base = [", "expected the name of a recipe"]),
        ({"a": "base = 'x\\u0007'".replace("'", '"')}, ["a.toml: base = ", "holds the control character U+0007"]),
        ({"a": "base = ''"}, ["a.toml: base = '': .: a folder"]),
        ({"a": "bsae = 'tiny'"}, ["a.toml: unknown key bsae (did you mean base?)"]),
        ({"a": "[train]\nbase = 'tiny'"}, ["a.toml: unknown key train.base"]),
        ({"a": "base = 'a.toml'"}, ["bases in a circle: a.toml → a.toml"]),
        ({"a": "base = 'b.toml'", "b": "base = './a.toml'"}, ["bases in a circle: a.toml → b.toml → a.toml"]),
        (
            {"a": "base = 'b0.toml'", **{f"b{i}": f"base = 'b{i + 1}.toml'" for i in range(9)}, "b9": ""},
            ["more than 8 bases: a.toml → b0.toml → b1.toml", "b8.toml; leave one out"],
        ),
        ({"a": "base = 'b.toml'", "b": "[train"}, ["adagrpo: b.toml: not valid TOML"]),
        ({"a": "base = 'b.toml'", "b": "[train]\nslotz = 1"}, ["adagrpo: b.toml: unknown key train.slotz (did you mean"]),
        ({"a": "base = 'b.toml'", "b": "[train]\nslots = 'x'"}, ["adagrpo: b.toml: train.slots = 'x': expected a whole"]),
        ({"a": "base = 'b.toml'\n[train]\nslots = 'x'", "b": ""}, ["adagrpo: a.toml: train.slots = 'x'"]),
        ({"a": "base = 'b.toml'", "b": "[train]\nslots = 0"}, ["train.slots = 0: must be at least 1 (base b.toml)"]),
        ({"a": "base = 'b.toml'", "b": "[optimizer]\nbetas = [0.9, 1.0]"}, ["optimizer.betas.1 = 1.0: ", "(base b.toml)"]),
        ({"a": "base = 'b.toml'\n[train]\nslots = 0", "b": ""}, ["train.slots = 0: must be at least 1\n"]),
    ],
)  # fmt: skip
def test_faults_name_file_key_and_remedy(texts: dict[str, str], words: list[str], files, capsys) -> None:
    files(**texts)
    error = refusal("a.toml", capsys=capsys) + "\n"
    assert all(word in error for word in words) and len(error) < 1000, error


def test_eight_bases_are_read(files) -> None:
    files(**{f"b{i}": f"base = 'b{i + 1}.toml'\n[train]\nslots = {i + 1}" for i in range(8)}, b8="[train]\nseed = 9")
    assert (load_recipe("b0.toml").train.slots, load_recipe("b0.toml").train.seed) == (1, 9)


DROPPED = [
    (
        "[engine]\nprecision = 'fp8'\nfp8_scaling = 'tensorwise'\nforward = 'compile'\nattention = 'native'\n",
        PLUGIN,
        "engine.precision engine.forward engine.attention engine.fp8_scaling",
    ),
    (
        "[model]\ntuning = 'lora'\nlora_rank = 8\nlora_alpha = 9.0\nlora_targets = ['x']\n",
        PLUGIN,
        "model.tuning model.lora_rank model.lora_alpha model.lora_targets",
    ),
    (
        "[model]\nmax_text_tokens = 12\nguidance = 2.0\ntimestep = 'bf16'\nprompt_cache = 3\ngradient_checkpointing = true\n",
        PLUGIN,
        "model.max_text_tokens model.guidance model.timestep model.prompt_cache model.gradient_checkpointing",
    ),
    (
        "[model]\npath = 'a/b'\nvariant = 'fp16'\nrevision = 'x'\n",
        "[model]\npath = 'tiny-flux'\n",
        "model.variant model.revision",
    ),
    ("[model]\ntuning = 'lora'\nlora_rank = 8\n", "[model]\ntuning = 'full'\n", "model.lora_rank"),
    ("[engine]\nprecision = 'fp8'\nfp8_scaling = 'tensorwise'\n", "[engine]\nprecision = 'bf16'\n", "engine.fp8_scaling"),
    (
        "[rollout]\ntail_steps = 2\ntail_solver = 'euler'\n",
        "[rollout]\ntail_steps = 0\n",
        "rollout.tail_solver",
    ),
    (
        "[rollout]\nfork_velocity = 'probe'\n[loss]\nold_logp = 'recompute'\n",
        "[rollout]\nplan = 'window'\n",
        "rollout.fork_velocity",
    ),
    (
        "[rollout]\nplan = 'window'\nwindow_size = 3\nwindow_stride = 2\nwindow_every = 5\nshared_noise = true\n"
        "[loss]\nold_logp = 'recompute'\n",
        "[rollout]\nplan = 'fork'\n",
        "rollout.window_size rollout.window_stride rollout.window_every rollout.shared_noise",
    ),
    ("[selection]\nprobe = 'short'\nprobe_steps = 2\n", "[selection]\nprobe = 'full'\n", "selection.probe_steps"),
    ("[selection]\nprobe = 'racing'\nrace_steps = [3, 9]\n", "[selection]\nprobe = 'pool'\n", "selection.race_steps"),
    (
        "[selection]\nprobe = 'memory'\nfinalists = 2\nallow_unseen = true\nhalf_life = 9.0\nnoise_share = 0.4\n"
        "group_evidence = 1.0\n",
        "[selection]\nprobe = 'full'\n",
        "selection.finalists selection.allow_unseen selection.half_life selection.noise_share selection.group_evidence",
    ),
    (
        "[selection]\nprobe = 'memory+pool'\nfinalists = 2\n",
        "[selection]\ncandidates = 1\n",
        "selection.probe selection.finalists",
    ),
    ("[selection]\nprobe = 'racing'\n", "[selection]\nstrategy = 'random'\n", "selection.probe"),
    ("[selection]\nstrategy = 'hardest'\n", "[selection]\ncandidates = 1\n", "selection.strategy"),
    (
        "[selection]\nstrategy = 'parts:pick'\nkwargs = {a = 1}\n[train]\npart_timeout = 5.0\n"
        "[data]\nprompts = 'p.txt'\nheld_out = 'h.txt'\n",
        "[selection]\nstrategy = 'closest'\n",
        "selection.kwargs train.part_timeout",
    ),
    ("[selection]\nstrategy = 'parts:pick'\nkwargs = {a = 1}\n", "[selection]\nstrategy = 'parts:other'\n", "selection.kwargs"),
    ("[advantage]\nfunction = 'parts:f'\nkwargs = {a = 1}\n", "[advantage]\nfunction = 'fused'\n", "advantage.kwargs"),
    (PLUGIN + "kwargs = {a = 1}\n", "[model]\nfamily = 'flux'\n", "model.kwargs"),
    (PLUGIN + "kwargs = {a = 1}\n", "[model]\nfamily = 'parts:other'\n", "model.kwargs"),
    ("[data]\nprompts = 'parts:prompts'\nkwargs = {a = 1}\n", "[data]\nprompts = 'tiny:even'\n", "data.kwargs"),
    ("[data]\nprompts = 'parts:prompts'\nkwargs = {a = 1}\n", "[data]\nprompts = 'parts:others'\n", "data.kwargs"),
    ("[loss]\nkl_weight = 0.1\nkl_variance = 'diffusion'\n[guards.kl]\nlimit = 1.0\n", "[loss]\nkl_weight = 0.0\n",
     "loss.kl_variance guards.kl.limit"),
    ("[train]\nsteps_per_iteration = 2\n[loss]\naverage = 'iteration'\n", "[train]\nsteps_per_iteration = 1\n", "loss.average"),
    (
        "[optimizer]\nschedule = 'cosine'\nfinal_share = 0.5\n",
        "[optimizer]\nschedule = 'constant'\n",
        "optimizer.final_share",
    ),
    ("[output]\nkeep_best = true\n", "[evaluation]\nevery = 0\n", "output.keep_best"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "own", "dropped"), DROPPED, ids=[keys for *_, keys in DROPPED])
def test_inherited_keys_that_nothing_reads_are_dropped(base: str, own: str, dropped: str, files, capsys) -> None:
    """Each recipe is sound alone, and the same keys in the user's own words are an error."""
    files(base=base, own=f"base = 'base.toml'\n{own}")
    read_recipe("base.toml").check()
    recipe, default = read_recipe("own.toml"), Config()
    recipe.check()
    keys = set(dropped.split())
    assert {each.key for each in recipe.dropped} == keys
    assert all(lookup(recipe.config, key) == lookup(default, key) for key in keys)
    assert all(f"{key} = " in recipe.notice for key in keys) and "base.toml" in recipe.notice and "\n" not in recipe.notice
    assert main(["train", "own.toml", "--print-config"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"note: {recipe.notice}\n" and printed.out.count("# default; dropped: ") == len(keys)
    assert tomllib.loads(printed.out) == tomllib.loads(to_toml(recipe.config))


def test_what_the_user_set_is_refused_where_it_has_no_effect(files, capsys) -> None:
    files(
        own=f"base = 'tiny'\n{PLUGIN}max_text_tokens = 12\n",
        plain=f"base = 'tiny'\n{PLUGIN}",
        alone=f"{PLUGIN}guidance = 2.0\n",
    )
    assert "model.max_text_tokens = 12: has no effect here" in refusal("own.toml", capsys=capsys)
    assert "model.guidance = 2.0: has no effect here" in refusal("alone.toml", capsys=capsys)
    tokens = ("--model.max-text-tokens", "12")  # the value that was dropped, now in the user's words
    assert "model.max_text_tokens = 12: has no effect here" in refusal("plain.toml", *tokens, capsys=capsys)
    assert "model.max_text_tokens = 12: has no effect" in refusal(
        "tiny", "--model.family", "parts:model", *tokens, capsys=capsys
    )
    assert main(["train", "tiny", "--dry-run", "--model.family", "parts:model"]) == 0
    assert "model.max_text_tokens = 12 of recipe tiny (has no effect here" in capsys.readouterr().err


def test_the_command_line_can_bring_back_what_was_dropped(files, capsys) -> None:
    files(own=f"base = 'tiny'\n{PLUGIN}")
    assert main(["train", "own.toml", "--print-config", "--model.family", "flux"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "max_text_tokens = 12  # base tiny" in printed.out


def test_inherited_values_that_contradict_the_own_are_refused_by_base(files, capsys) -> None:
    files(own="base = 'flux1-dev-official'\n[selection]\nprobe = 'racing'\n")
    error = refusal("own.toml", capsys=capsys)
    assert "rollout.fork_velocity = probe: with selection.probe = racing it must be fresh (base flux1-dev-official)" in error
    files(own="base = 'low.toml'\n[selection]\nprobe = 'memory'\n", low="[selection]\nstrategy = 'hardest'\n")
    assert "selection.strategy = hardest: selection.probe = memory knows closest only (base low.toml)" in refusal(
        "own.toml", capsys=capsys
    )


@pytest.mark.parametrize(
    "own", ["[data]\nprompts = 'tiny:even'\nheld_out = 'tiny:held_out'\n", PLUGIN.replace("model'", "other'")]
)
def test_secrets_of_a_base_are_not_shown(own: str, files, capsys) -> None:
    secret = "sk-very-secret-4711"
    kwargs = f"kwargs = {{api_key = '{secret}'}}\n"
    files(low=f"{PLUGIN}{kwargs}[data]\nprompts = 'parts:prompts'\n{kwargs}", own=f"base = 'low.toml'\n{own}")
    assert main(["train", "own.toml", "--print-config"]) == 0
    printed = capsys.readouterr()
    assert "kwargs = {'api_key': '<redacted>'} of base low.toml" in printed.err
    assert secret not in printed.out + printed.err
    files(alone=f"[data]\nprompts = 'p.txt'\nheld_out = 'h.txt'\n{kwargs}")
    assert secret not in refusal("alone.toml", capsys=capsys)


def test_a_run_needs_no_base_once_it_began(files, capsys) -> None:
    model, data = {"family": "parts:model", "device": "cpu"}, {"prompts": "parts:prompts", "held_out": "parts:held_out"}
    config = toy_config(model=model, data=data, rewards=(RewardConfig("parts:reward"),), name="toy")
    files(low=to_toml(config), own="base = 'low.toml'\n[train]\niterations = 2\n")
    assert main(["train", "own.toml", "--out", "run"]) == 0
    recorded = Path("run/config.toml").read_text("utf-8")
    assert recorded == to_toml(load_recipe("own.toml")) and "#" not in recorded and "base" not in tomllib.loads(recorded)
    Path("low.toml").unlink()
    assert main(["train", "run/config.toml", "--out", "run", "--resume", "latest", "--train.iterations", "3"]) == 0


def test_comments_hold_whatever_a_base_is_called(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "line\nbreak"
    folder.mkdir()
    (folder / "low \u2028#.toml").write_text("[train]\nseed = 3\n", "utf-8")
    (folder / "own.toml").write_text('base = "low \u2028#.toml"\n', "utf-8")
    printed = annotated(read_recipe(folder / "own.toml"))
    assert tomllib.loads(printed)["train"]["seed"] == 3 and re.search(r"^seed = 3  # base .*low", printed, re.MULTILINE)
