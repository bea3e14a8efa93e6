"""Law: a setting has one name, one default and one text, wherever it can be written."""

from __future__ import annotations

import json
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
from models import tiny
from transformers import HfArgumentParser

from hf_zo import ZOArguments, ZOTrainingArguments
from hf_zo.arguments import PREFIX, RENAMED
from hf_zo.estimate.cli import _parser
from zo_core import ConfigError, ZeroOrder, ZOConfig

ROOT = Path(__file__).parents[2]
SETTINGS = {setting.name: setting for setting in fields(ZOConfig)}
ARGUMENTS = {
    RENAMED.get(one.name, one.name.removeprefix(PREFIX)): one
    for one in fields(ZOArguments)
    if one.name.startswith(PREFIX)  # the others are the trainer's own, with another default
}

#: Settings without a ``zo_*`` field, and the other way round.
TRAINERS_OWN = {"weight_decay"}  # `TrainingArguments.weight_decay` counts
NO_SETTING = {"log"}  # the engine has no log of its own, the trainer gives it one

#: Options of ``zo-estimate`` that only share a name with a setting.
OTHER_MEANING = {"device"}  # the kind of machine that is asked about, for streamed and resident models alike


def test_every_setting_has_a_text() -> None:
    for name in SETTINGS:
        text = ZOConfig.help_for(name)
        assert text.endswith(".")
        assert not set(text) & set("%|\n"), "argparse formats %, and a table in Markdown has its own use for the others"


def test_arguments_are_the_settings() -> None:
    assert ARGUMENTS.keys() - NO_SETTING == SETTINGS.keys() - TRAINERS_OWN
    assert {one.name for one in fields(ZOTrainingArguments)} >= TRAINERS_OWN


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - NO_SETTING))
def test_an_argument_has_the_default_and_the_text_of_its_setting(name: str) -> None:
    argument, setting = ARGUMENTS[name], SETTINGS[name]
    assert repr(argument.default) == repr(setting.default)
    assert argument.metadata["help"] == ZOConfig.help_for(name)


def test_help_shows_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(ZOArguments).parse_args_into_dataclasses(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(ZOConfig.help_for(name).split()) in shown for name in SETTINGS.keys() - TRAINERS_OWN)


def test_options_of_zo_estimate_that_are_settings_have_their_text() -> None:
    options = {action.dest: action.help for action in _parser()._actions if action.dest in SETTINGS}
    assert options.keys() == OTHER_MEANING | {"estimator", "num_probes", "rule", "blocks", "device_memory", "backprop"}
    for name in options.keys() - OTHER_MEANING:
        assert options[name] == ZOConfig.help_for(name)


def test_the_page_has_the_table_of_these_texts() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"](page), "run: python docs/settings.py"


def test_the_docstring_lists_them_for_help_and_notebooks() -> None:
    documentation = ZOConfig.__doc__ or ""
    assert documentation.startswith("What to measure")
    assert all(f"\n    {name}: {ZOConfig.help_for(name)}" in documentation for name in SETTINGS)


def test_blocks_and_device_come_from_a_command_line() -> None:
    given = ["--zo_offload", "cpu", "--zo_blocks", "model.layers", "lm_head", "--zo_device", "cpu"]
    (args,) = HfArgumentParser(ZOArguments).parse_args_into_dataclasses(given)
    config = args.to_zo_config()
    assert config == ZOConfig(offload="cpu", blocks=("model.layers", "lm_head"), device="cpu")
    zo = ZeroOrder(tiny("llama"), config.replace(blocks=["model.layers"]))
    assert [block.name for block in zo.streaming.blocks] == ["model.layers.0", "model.layers.1"]
    zo.close()


def test_blocks_survive_json_and_a_single_name_is_an_error() -> None:
    config = ZOConfig(blocks=["model.layers"])
    assert ZOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"blocks='model.layers' must be several names.*\['model.layers'\]"):
        ZOConfig(blocks="model.layers")
