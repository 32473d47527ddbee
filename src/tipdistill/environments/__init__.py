"""What a student acts on: tools and environments, and the loop in which it calls them, turn by turn.

    world.py   the tools of one rollout, called from a thread of its own
    acting.py  prompts with tools, from the dataset's rows to episodes
    play.py    the loop: the student writes, its calls are answered, it goes on; used wherever a student is sampled

An environment is a class in the protocol of TRL's GRPOTrainer; docs/agents.md shows one.
"""

from .acting import Acting, play_prompts
from .play import Episode, Limits, play
from .world import World, Worlds, read_environment

__all__ = ["Acting", "Episode", "Limits", "World", "Worlds", "play", "play_prompts", "read_environment"]
