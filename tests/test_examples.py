"""The worked examples in docstrings give what they say."""
import doctest
import importlib

import pytest

MODULES = ("configurator", "model", "muonclip", "kernels", "data", "pretrain", "sft", "eval",
           "support.tokenizer", "support.ranks", "support.sources", "support.log", "support.tasks",
           "support.conversations", "support.selection", "support.weights", "support.generation",
           "support.scores", "synthetic.texts", "synthetic.conversations", "tools.ablate",
           "tools.grow", "tools.plan", "tools.prepare", "tools.profile_step", "tools.sandbox")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_right(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_ideas_have_examples():
    finder = doctest.DocTestFinder()
    found = {name: sum(bool(test.examples) for test in finder.find(importlib.import_module(name)))
             for name in MODULES}
    assert sum(found.values()) >= 15, found
