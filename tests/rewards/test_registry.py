"""From a name in a config to a reward: every way of naming one, and what is said when the name is wrong."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewards import BUILTINS, Reward, load_rewards, score

#: Arguments for the built-ins that need some.
FACTORY_ARGS = {"shapes_preference": {"attribute": "background", "values": ["red"]}}
ROOT = Path(__file__).parents[2]
SCORE = "def score(images, prompts):\n    return [1.0 for _ in images]\n"


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """The user stands in an empty folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(file: str, text: str) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def values(reward: Reward, images: int = 2, **columns) -> list[float]:
    scores, failures = score([reward], [None] * images, ["p"] * images, columns)
    assert not failures
    return scores[0]


def plain(images, prompts):
    return [0.0 for _ in images]


def required_column(images, prompts, target):
    return [float(t) for t in target]


def optional_column(images, prompts, target=None):
    return [0.0 if target is None else 1.0 for _ in images]


def keyword_only_columns(images, prompts, *, target, weight=2.0):
    return [float(t) for t in target]


def every_column(images, prompts, **columns):
    return [float(len(columns)) for _ in images]


def one_column_and_the_rest(images, prompts, target, **columns):
    return [float(len(columns)) for _ in images]


class Instance:
    def __call__(self, images, prompts, target):
        return [float(t) for t in target]

    def method(self, images, prompts):
        return [7.0 for _ in images]


# --- Laziness ---


def test_importing_rewards_loads_nothing_heavy_and_no_built_in():
    code = "import sys, json, rewards, rewards.calling; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    loaded = set(json.loads(printed))
    assert {"rewards", "rewards.registry"} <= loaded
    heavy = {"torch", "transformers", "diffusers", "datasets", "accelerate", "scipy", "numpy", "align"}
    assert not loaded & (heavy | {builtin.target.partition(":")[0] for builtin in BUILTINS.values()})


def test_a_built_in_is_imported_when_it_is_asked_for():
    code = (
        "import sys, rewards; before = 'rewards.shapes' in sys.modules; rewards.load_rewards(['shapes_exact']); "
        "print(before, 'rewards.shapes' in sys.modules, 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.split() == ["False", "True", "False"]


SHAPES = sorted(name for name, builtin in BUILTINS.items() if builtin.target.startswith("rewards.shapes:"))


@pytest.mark.parametrize("name", SHAPES)
def test_every_built_in_of_the_embedded_world_resolves_under_its_own_name(name):
    (reward,) = load_rewards([{"use": name, "args": FACTORY_ARGS[name]} if BUILTINS[name].factory else name])
    assert (reward.name, reward.weight) == (name, 1.0)
    assert callable(reward.function) and reward.required == (() if name == "grounded" else ("spec",))


def test_a_factory_that_needs_args_is_told_what_it_takes():
    with pytest.raises(
        ValueError, match=r"'shapes_preference' do not fit: missing .*'attribute'\. It takes \(attribute"
    ):
        load_rewards(["shapes_preference"])


# --- Ways to name a reward ---


def test_module_and_attribute_are_found_in_the_working_folder():
    write("my_rewards.py", SCORE)
    (reward,) = load_rewards(["my_rewards:score"])
    assert (reward.name, reward.weight, reward.columns, reward.required) == ("score", 1.0, (), ())
    assert values(reward) == [1.0, 1.0]


def test_a_module_may_lie_in_a_package():
    write("my_package/__init__.py", "")
    write("my_package/inner.py", SCORE)
    assert values(load_rewards(["my_package.inner:score"])[0]) == [1.0, 1.0]


@pytest.mark.parametrize("form", ["./my_reward.py:score", "my_reward.py:score", "absolute", "~/my_reward.py:score"])
def test_a_file_is_named_by_any_path(form, user_folder, monkeypatch):
    write("my_reward.py", SCORE)
    monkeypatch.setenv("HOME", str(user_folder))
    use = f"{user_folder}/my_reward.py:score" if form == "absolute" else form
    assert values(load_rewards([use])[0]) == [1.0, 1.0]


@pytest.mark.parametrize("when", ["with the file", "when called"])
def test_a_file_in_another_folder_imports_its_neighbours(when):
    write("elsewhere/neighbour_of_reward.py", "VALUE = 3.0\n")
    imported = "from neighbour_of_reward import VALUE\n"
    if when == "with the file":
        text = imported + "def score(images, prompts):\n    return [VALUE for _ in images]\n"
    else:
        text = f"def score(images, prompts):\n    {imported}    return [VALUE for _ in images]\n"
    write("elsewhere/my_reward.py", text)
    assert values(load_rewards(["elsewhere/my_reward.py:score"])[0]) == [3.0, 3.0]


def test_a_file_that_failed_can_be_loaded_once_it_is_mended():
    """In a notebook the half of it that had been run would go on being used, without the function."""
    write("my_reward.py", "import no_such_package\n" + SCORE)
    with pytest.raises(ImportError, match="no_such_package"):
        load_rewards(["my_reward.py:score"])
    write("my_reward.py", SCORE)
    assert values(load_rewards(["my_reward.py:score"])[0]) == [1.0, 1.0]


def test_a_file_of_rewards_hides_no_module_that_is_loaded_later():
    write("elsewhere/my_reward.py", SCORE)
    write("elsewhere/colorsys.py", "raise RuntimeError('not the standard library')\n")
    load_rewards(["elsewhere/my_reward.py:score"])
    code = f"import sys; sys.path[:] = {sys.path!r}; import colorsys; print(colorsys.rgb_to_hsv(0, 0, 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(0.0, 0.0, 0)", done.stderr


def test_files_of_one_name_in_two_folders_keep_their_own_functions():
    for folder, value in (("a", 1.0), ("b", 2.0)):
        text = f"VALUE = {value}\ndef score(images, prompts):\n    return [VALUE for _ in images]\n"
        write(f"{folder}/my_reward.py", text)
    first, second = load_rewards(["a/my_reward.py:score", {"use": "b/my_reward.py:score", "name": "other"}])
    assert (values(first), values(second)) == ([1.0, 1.0], [2.0, 2.0])


def test_a_dataclass_in_a_reward_file_works():
    # It looks its own module up by name, so the module must be registered.
    text = (
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Scale:\n    by: float = 2.0\n"
        "def score(images, prompts):\n    return [Scale().by for _ in images]\n"
    )
    write("my_reward.py", text)
    assert values(load_rewards(["my_reward.py:score"])[0]) == [2.0, 2.0]


def test_args_make_the_attribute_a_factory():
    text = (
        "def make(scale, shift=0.0):\n    def score(images, prompts):\n        return [scale + shift for _ in images]\n"
        "    return score\n"
    )
    write("my_reward.py", text)
    specs = [
        {"use": "my_reward.py:make", "args": {"scale": 2}},
        {"use": "my_reward.py:make", "args": {"scale": 3, "shift": 0.5}, "name": "shifted", "weight": 0.25},
    ]
    first, second = load_rewards(specs)
    assert [(r.name, r.weight) for r in (first, second)] == [("make", 1.0), ("shifted", 0.25)]
    assert (values(first), values(second)) == ([2.0, 2.0], [3.5, 3.5])


def test_a_class_with_args_is_a_factory_of_instances():
    text = (
        "class Scaled:\n    def __init__(self, scale):\n        self.scale = scale\n"
        "    def __call__(self, images, prompts, target):\n        return [self.scale * t for t in target]\n"
    )
    write("my_reward.py", text)
    (reward,) = load_rewards([{"use": "my_reward.py:Scaled", "args": {"scale": 2.0}}])
    assert reward.required == ("target",) and values(reward, target=[1, 3]) == [2.0, 6.0]


@pytest.mark.parametrize("weight", [0, 1, 2.5, -1.0, "1e-1"])
def test_a_weight_is_any_finite_number(weight):
    (reward,) = load_rewards([{"use": "shapes_exact", "weight": weight}])
    assert reward.weight == float(weight) and isinstance(reward.weight, float)


@pytest.mark.parametrize(
    "specs", ["shapes_exact", {"use": "shapes_exact", "weight": 2}, plain, Reward("given", plain, 1.0, (), ())]
)
def test_one_reward_may_stand_without_a_list(specs):
    assert load_rewards(specs) == load_rewards([specs])


def test_a_reward_that_is_ready_stays_as_it_is():
    ready = Reward("mine", plain, 0.5, (), ())
    assert load_rewards([ready])[0] is ready


# --- Callables ---


def test_functions_lambdas_instances_methods_and_partials_are_rewards():
    scaled = functools.partial(lambda images, prompts, scale: [scale for _ in images], scale=4.0)
    rewards = [
        *load_rewards([plain, Instance(), Instance().method, lambda images, prompts: [5.0 for _ in images]]),
        *load_rewards([scaled]),
    ]
    assert [r.name for r in rewards] == ["plain", "Instance", "method", "custom_reward", "partial"]
    assert [values(r, target=[6, 6])[0] for r in rewards] == [0.0, 6.0, 7.0, 5.0, 4.0]


def test_an_object_without_a_name_is_called_by_its_class():
    assert not hasattr(Instance(), "__name__")
    assert load_rewards([Instance()])[0].name == "Instance"


def test_an_async_function_is_a_reward():
    async def asynchronous(images, prompts, target):
        return target

    (reward,) = load_rewards([asynchronous])
    assert reward.required == ("target",) and values(reward, target=[1, 2]) == [1.0, 2.0]


# --- Columns ---


@pytest.mark.parametrize(
    ("function", "columns", "required"),
    [
        (plain, (), ()),
        (required_column, ("target",), ("target",)),
        (optional_column, ("target",), ()),
        (keyword_only_columns, ("target", "weight"), ("target",)),
        (every_column, None, ()),
        (one_column_and_the_rest, None, ("target",)),
        (Instance(), ("target",), ("target",)),
    ],
)
def test_the_signature_says_which_columns_are_taken(function, columns, required):
    (reward,) = load_rewards([function])
    assert (reward.columns, reward.required) == (columns, required)


@pytest.mark.parametrize("function", [plain, optional_column, every_column])
def test_columns_with_a_default_need_not_be_in_the_data(function):
    load_rewards([function])[0].check_columns(["prompt"])


@pytest.mark.parametrize("function", [required_column, keyword_only_columns, one_column_and_the_rest, Instance()])
def test_a_column_without_a_default_must_be_in_the_data(function):
    (reward,) = load_rewards([function])
    reward.check_columns(["prompt", "target"])
    with pytest.raises(ValueError, match=f"reward '{reward.name}' needs the data column 'target'.*mean 'targets'"):
        reward.check_columns(iter(["prompt", "targets"]))


def test_a_missing_column_with_nothing_near_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'target', which the data lacks\. There are: zzz"):
        load_rewards([required_column])[0].check_columns(["zzz", "prompt"])


@pytest.mark.parametrize("column", ["images", "prompts"])
def test_a_column_named_as_an_argument_is_refused_where_every_column_is_taken(column):
    with pytest.raises(ValueError, match=f"takes every data column, and a column '{column}' clashes"):
        load_rewards([every_column])[0].check_columns(["prompt", column])
    load_rewards([required_column])[0].check_columns(["prompt", "target", column])


# --- Errors ---


@pytest.mark.parametrize(
    ("spec", "error", "fragments"),
    [
        ("shapes_folowing", ValueError, ["unknown reward 'shapes_folowing'", "Did you mean 'shapes_following'?"]),
        (
            "zzz",
            ValueError,
            [
                "unknown reward 'zzz'",
                "There are: aesthetic, ",
                ", shapes_exact, shapes_following",
                "module:attr or file.py:attr",
            ],
        ),
        ("my_reward.py", ValueError, ["unknown reward 'my_reward.py'", "file.py:attr"]),
        (":score", ValueError, ["unknown reward ':score'", "module:attr"]),
        ("my_reward:", ValueError, ["unknown reward 'my_reward:'", "module:attr"]),
        ("rewards.shapes:shapes_exat", ValueError, ["rewards.shapes has no 'shapes_exat'", "mean 'shapes_exact'"]),
        ("my_reward.py:skore", ValueError, ["my_reward.py has no 'skore'", "Did you mean 'score'?"]),
        ("my_reward.py:zzz", ValueError, ["my_reward.py has no 'zzz'", "There are: make, number, score"]),
        ("my_rewrd.py:score", FileNotFoundError, ["my_rewrd.py does not exist", "Did you mean 'my_reward.py'?"]),
        ("nowhere/my_reward.py:score", FileNotFoundError, ["nowhere/my_reward.py does not exist", "looked for"]),
        ("no_such_module:score", ImportError, ["'no_such_module' was not found"]),
        ("rewards.shape:shapes_exact", ImportError, ["'rewards.shape' was not found"]),
        ("./my_reward:score", ImportError, ["not a module name", "./my_reward.py:attr"]),
        ("folder/my_reward:score", ImportError, ["not a module name", "folder/my_reward.py:attr"]),
        ("broken.py:score", ImportError, ["broken.py could not be imported", "no_such_package"]),
        ("broken:score", ImportError, ["'broken' could not be imported", "no_such_package"]),
        ("half:score", ImportError, ["'half' could not be imported", "cannot import name 'no_such_name'"]),
        ("rewards.registry:BUILTINS", ValueError, ["'rewards.registry:BUILTINS' is dict, not callable"]),
        ({"use": "rewards.registry:BUILTINS", "args": {"a": 1}}, ValueError, ["is dict, not callable"]),
        ({"use": "shapes_exact", "wieght": 1}, ValueError, ["unknown key 'wieght'", "Did you mean 'weight'?"]),
        ({"use": "shapes_exact", 3: 1}, ValueError, ["unknown key 3", "There are: args, endpoints, environment"]),
        ({"weight": 1}, ValueError, ["{'weight': 1} needs `use`"]),
        ({"use": None}, ValueError, ["needs `use`"]),
        ({}, ValueError, ["needs `use`"]),
        (None, ValueError, ["None is NoneType: give a name, or a mapping with `use`"]),
        (["shapes_exact"], ValueError, ["['shapes_exact'] is list"]),
        ({"use": "shapes_exact", "weight": "much"}, ValueError, ["'shapes_exact'", "finite number, found 'much'"]),
        ({"use": "shapes_exact", "weight": True}, ValueError, ["must be a finite number, found True"]),
        ({"use": "shapes_exact", "weight": None}, ValueError, ["must be a finite number, found None"]),
        ({"use": "shapes_exact", "weight": float("inf")}, ValueError, ["must be a finite number, found inf"]),
        ({"use": "shapes_exact", "weight": float("nan")}, ValueError, ["must be a finite number, found nan"]),
        ({"use": "my_reward.py:make", "args": {"skale": 1}}, ValueError, ["do not fit", "'skale'", "takes (scale)"]),
        ({"use": "my_reward.py:make", "args": {}}, ValueError, ["do not fit", "'scale'", "takes (scale)"]),
        (
            {"use": "my_reward.py:make", "args": 3},
            ValueError,
            ["`args` of reward 'my_reward.py:make' must be a mapping"],
        ),
        ({"use": "hpsv2", "args": [1]}, ValueError, ["`args` of reward 'hpsv2' must be a mapping, found [1]"]),
        ({"use": "brightness", "name": 5}, ValueError, ["`name` of reward 'brightness' must be text, found 5"]),
        (
            {"use": "hpsv2", "args": {"backend": "package"}, "environment": "/x"},
            ValueError,
            ["the environment of reward 'hpsv2' must be a mapping, found str"],
        ),
        ({"use": "ocr", "args": {"pattern": "("}}, ValueError, ["of reward 'ocr' do not fit", "missing )"]),
        ({"use": "ocr", "args": {"min_side": "x"}}, ValueError, ["of reward 'ocr' do not fit: TypeError"]),
        ({"use": "my_reward.py:number", "args": {}}, ValueError, ["'number' is int", "must return a function"]),
        ("my_reward.py:make", ValueError, ["'make' must take (images, prompts, ...), found (scale)"]),
        ("builtins:max", ValueError, ["'max' must take (images, prompts, ...)"]),
    ],
)
def test_a_wrong_entry_is_answered_with_what_was_found_and_what_would_do(spec, error, fragments):
    write("my_reward.py", SCORE + "def make(scale):\n    return score\ndef number():\n    return 3\n")
    write("broken.py", "import no_such_package\n" + SCORE)
    write("half.py", "from json import no_such_name\n" + SCORE)
    with pytest.raises(error) as caught:
        load_rewards([spec])
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_error_inside_a_reward_file_keeps_its_type_and_place():
    write("my_reward.py", "def score(images, prompts:\n    pass\n")
    with pytest.raises(SyntaxError, match=r"my_reward\.py"):
        load_rewards(["my_reward.py:score"])


def test_a_file_that_fails_leaves_no_folder_before_the_standard_library():
    write("elsewhere/my_reward.py", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_rewards(["elsewhere/my_reward.py:score"])
    assert os.path.abspath("elsewhere") not in sys.path


@pytest.mark.parametrize("specs", [[], (), None])
def test_no_reward_is_refused(specs):
    with pytest.raises(ValueError, match=r"no reward was given.*--rewards"):
        load_rewards(specs)


def test_two_rewards_of_one_name_are_refused_until_one_is_renamed():
    with pytest.raises(ValueError, match=r"two rewards are both called 'shapes_exact'.*another `name`"):
        load_rewards(["shapes_exact", "shapes_word", {"use": "rewards.shapes:shapes_exact", "weight": 0}])
    rewards = load_rewards(["shapes_exact", {"use": "shapes_exact", "name": "again"}])
    assert [r.name for r in rewards] == ["shapes_exact", "again"]


@pytest.mark.parametrize(
    "function",
    [
        lambda images: [],
        lambda prompts, images: [],
        lambda images, target, prompts: [],
        lambda *args: [],
        lambda **columns: [],
        lambda images, /, prompts: [],
    ],
)
def test_a_signature_without_images_and_prompts_is_refused_and_shown(function):
    with pytest.raises(ValueError, match=r"'custom_reward' must take \(images, prompts, \.\.\.\), found \("):
        load_rewards([function])
