"""Environments as classes that users write: what is refused, and what each rollout has for itself."""

import threading

import pytest
from acting import Counter, Shop

from tipdistill import dotted
from tipdistill.environments import World, Worlds, read_environment
from tipdistill.environments.world import as_text, observed, tools_of
from tipdistill.types import Verdict


class NoReset:
    def act(self) -> str:
        """Act."""
        return ""


class NoTool:
    def reset(self, **row):
        return None

    def get_reward(self):
        return 1.0


class NoSchema:
    def reset(self, **row):
        return None

    def act(self, thing):
        return thing


class NeedsArguments:
    def __init__(self, path):
        self.path = path


class Threads:
    """Remembers which thread it was in."""

    def reset(self, **row):
        self.threads = {threading.get_ident()}

    def act(self) -> str:
        """Act."""
        self.threads.add(threading.get_ident())
        return str(len(self.threads))

    @property
    def costly(self):
        raise AssertionError("properties are not looked at")

    def get_reward(self):
        self.threads.add(threading.get_ident())
        return float(len(self.threads) == 1 and threading.current_thread() is not threading.main_thread())


class Failing(Counter):
    def reset(self, **row):
        raise KeyError("city")

    def get_reward(self):
        return "much"


def test_the_tools_are_the_public_methods_as_in_trl():
    assert [tool.__name__ for tool in tools_of(Shop())] == ["ask", "buy", "leave", "price", "read", "wait"]
    assert [tool.__name__ for tool in tools_of(Threads())] == ["act"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (NoReset, "no method `reset"),
        (NoTool, "has no tool"),
        (NoSchema, "the tool act gives no schema"),
        (NeedsArguments, "cannot be made without arguments"),
        ("no.such.Environment", "there is no environment 'no.such.Environment'"),
        ("trip", "give the dotted path of a class"),
        (7, "is a int, and not a class"),
    ],
)
def test_what_is_no_environment_is_refused(source, said):
    with pytest.raises(ValueError, match=said):
        read_environment(source)


def test_a_dry_run_imports_no_environment():
    with dotted.names_only():
        assert isinstance(read_environment("acting.Shop"), dotted.NotImported)
    assert read_environment("acting.Shop") is Shop


def test_each_rollout_has_an_object_and_a_thread_of_its_own_which_are_used_again():
    worlds = Worlds(factory=Threads)
    first, _ = worlds.begin([{}, {}])
    assert [world.answer(world.call("act", {}), 5.0) for world in first] == ["1", "1"]
    assert [world.verdict("", 5.0) for world in first] == [Verdict(True, {}, {"reward": 1.0})] * 2
    objects = {id(world._environment) for world in first}
    again, _ = worlds.begin([{}, {}])
    assert {id(world._environment) for world in again} == objects
    assert len(objects) == 2
    worlds.close()


def test_a_rollout_begins_from_its_row():
    worlds = Worlds(factory=Shop)
    (one, other), said = worlds.begin([{"wanted": "pear", "money": 7}, {"wanted": "apple"}])
    assert said == [" You have 7 coins.", " You have 5 coins."]
    one.answer(one.call("buy", {"item": "pear"}), 5.0)
    other.answer(other.call("buy", {"item": "pear"}), 5.0)
    assert one.verdict("thanks", 5.0).correct
    assert not other.verdict("", 5.0).correct
    worlds.close()


def test_what_fails_in_an_environment_is_named_with_the_row():
    with pytest.raises(ValueError, match=r"reset failed for the row \{'city': 'Ulm'\}: KeyError: 'city'"):
        Worlds(factory=Failing).begin([{"city": "Ulm"}])
    world = World(factory=Counter)
    world.reset({}, 5.0)
    world._environment.get_reward = lambda: "much"
    with pytest.raises(ValueError, match="is a str"):
        world.verdict("", 5.0)
    world.close()


def test_tools_are_shared_functions_beside_an_environment():
    def double(number: int) -> int:
        """Double.

        Args:
            number: any
        """
        return 2 * number

    worlds = Worlds([double], Counter)
    (world,), _ = worlds.begin([{}])
    assert world.names == ["double", "add"]
    assert world.answer(world.call("double", {"number": 4}), 5.0) == "8"
    (plain,), said = Worlds([double]).begin([{"any": 1}])
    assert said == [None]
    assert plain.verdict("", 5.0) is None
    assert [tool.__name__ for tool in worlds.schemas()] == ["double", "add"]
    worlds.close()


def test_the_tools_are_described_by_one_object_however_often_they_are_asked_for():
    made, worlds = Shop.made, Worlds(factory=Shop)
    assert worlds.schemas() is worlds.schemas() is worlds.apart().schemas()
    assert Shop.made == made + 1


def test_an_observation_ends_the_last_message_and_leaves_the_row_alone():
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "Go."}]}]
    seen = observed(prompt, "A door.")
    assert seen[-1]["content"] == [{"type": "text", "text": "Go."}, {"type": "text", "text": "A door."}]
    assert prompt[-1]["content"] == [{"type": "text", "text": "Go."}]
    assert observed(prompt, None) is prompt


def test_results_become_text():
    class Thing:
        def __str__(self):
            return "thing"

    assert [as_text(value) for value in ("a", 1.5, [1], Thing(), "\ud800")] == ["a", "1.5", "[1]", "thing", "?"]
