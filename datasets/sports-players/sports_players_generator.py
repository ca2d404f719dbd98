"""Which sport somebody plays.

"Fact: Tiger Woods plays the sport of golf\\nFact: Tom Brady plays the sport of" ->
" football"; the corrupt prompt is about a player of another sport. All names have the same
number of tokens. Writes `sports_players_<model>_prompts.json`.

Whether a model knows a player is for you to see: measure the accuracy. The task is that of
Nanda et al. 2023, "Fact Finding"; the players are others.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prompt_writer import (  # noqa: E402  # pyright: ignore
    Prompt,
    PromptFile,
    TextConfig,
    check_aligned,
    render,
    single_token_words,
    token_ids,
    token_labels,
)

TEMPLATE = "Fact: Tiger Woods plays the sport of golf\nFact: {name} plays the sport of"
PLAYERS = {
    "football": (
        "Tom Brady, Peyton Manning, Aaron Rodgers, Joe Montana, Jerry Rice, Drew Brees, "
        "Dan Marino, Brett Favre, Eli Manning, Russell Wilson, Patrick Mahomes, Jim Brown, "
        "Walter Payton, Barry Sanders, Emmitt Smith, Randy Moss, Terrell Owens, Ray Lewis, "
        "Cam Newton, Tony Romo, Joe Namath, Marshawn Lynch, Adrian Peterson, Matt Ryan, "
        "Philip Rivers, Andrew Luck, Michael Vick, Steve Young, Julio Jones, Von Miller"
    ).split(", "),
    "basketball": (
        "Michael Jordan, LeBron James, Kobe Bryant, Magic Johnson, Larry Bird, Tim Duncan, "
        "Stephen Curry, Kevin Durant, Allen Iverson, Karl Malone, Charles Barkley, "
        "Scottie Pippen, Chris Paul, Dwyane Wade, James Harden, Steve Nash, Jason Kidd, "
        "Kevin Garnett, Patrick Ewing, John Stockton, Dirk Nowitzki, Yao Ming, Tony Parker, "
        "Ray Allen, Paul Pierce, Vince Carter, Dwight Howard, Derrick Rose, Bill Russell, "
        "Kyrie Irving"
    ).split(", "),
    "baseball": (
        "Babe Ruth, Willie Mays, Hank Aaron, Ted Williams, Derek Jeter, Barry Bonds, "
        "Alex Rodriguez, Mike Trout, Lou Gehrig, Mickey Mantle, Ty Cobb, Cy Young, "
        "Roger Clemens, Randy Johnson, Greg Maddux, Albert Pujols, Mark McGwire, "
        "Sammy Sosa, Pete Rose, Nolan Ryan, Roberto Clemente, Jackie Robinson, Yogi Berra, "
        "Bryce Harper, Clayton Kershaw, David Ortiz, Ichiro Suzuki, Tony Gwynn, Reggie "
        "Jackson, Johnny Bench"
    ).split(", "),
}


def name_lengths(tokenizer: Any) -> dict[str, int]:
    """The number of tokens of each player's name, after a space."""
    names = [name for players in PLAYERS.values() for name in players]
    return {name: len(token_ids(tokenizer, f" {name}")) for name in names}


def players_of_length(tokenizer: Any, name_tokens: int | None) -> dict[str, str]:
    """Player -> sport, for names of this many tokens; None: the commonest number.

    Raises ValueError if one of the sports has no such player.
    """
    lengths = name_lengths(tokenizer)
    wanted = name_tokens or Counter(lengths.values()).most_common(1)[0][0]
    found = {
        name: sport
        for sport, players in PLAYERS.items()
        for name in players
        if lengths[name] == wanted
    }
    if set(found.values()) != set(PLAYERS):
        raise ValueError(
            f"Some sport has no player whose name is {wanted} tokens of this tokenizer; "
            f"the names' lengths are {dict(Counter(lengths.values()))}."
        )
    return found


def sports_players_prompts(
    tokenizer: Any, n_prompts: int = 250, seed: int = 0, name_tokens: int | None = None
) -> PromptFile:
    """Prompts with labels; word_idxs (without BOS): first_name_tok, final_name_tok, end.

    Players in random order, each as often as the others, give or take one.
    """
    rng = random.Random(seed)
    sport_of = players_of_length(tokenizer, name_tokens)
    sports = single_token_words(tokenizer, PLAYERS, at_least=len(PLAYERS))
    # Rounds over the players, each with another opponent; none comes twice.
    rounds = {name: _shuffled(_others(sport_of, name), rng) for name in sport_of}
    prompts: list[Prompt] = []
    while len(prompts) < n_prompts:
        names = [name for name in _shuffled(list(sport_of), rng) if rounds[name]]
        if not names:
            raise ValueError(
                f"There are only {len(prompts)} different prompts; {n_prompts} were "
                "asked for. Lower `n_prompts`."
            )
        prompts += [_prompt(name, rounds[name].pop(), sport_of, sports) for name in names]
    prompts = prompts[:n_prompts]
    check_aligned(tokenizer, prompts)
    labels = token_labels(tokenizer, render(TEMPLATE, name=next(iter(sport_of))))
    first = labels.index("name")
    final = first + labels.count("name") - 1
    idxs = {
        "first_name_tok": first,
        "final_name_tok": final,
        "end": len(labels) - 1,
    }
    return PromptFile(prompts, labels, idxs)


def _others(sport_of: dict[str, str], name: str) -> list[str]:
    return [other for other in sport_of if sport_of[other] != sport_of[name]]


def _shuffled(names: list[str], rng: random.Random) -> list[str]:
    return rng.sample(names, len(names))


def _prompt(name: str, other: str, sport_of: dict[str, str], sports: list[str]) -> Prompt:
    return {
        "clean": TEMPLATE.format(name=name),
        "corrupt": TEMPLATE.format(name=other),
        "answers": [f" {sport_of[name]}"],
        "wrong_answers": [f" {sport}" for sport in sports if sport != sport_of[name]],
    }


@dataclass(frozen=True)
class Config(TextConfig):
    """Which prompts to write."""

    tokenizer: str = "EleutherAI/pythia-2.8b-deduped"
    """A Hugging Face hub name, or the folder of a tokenizer."""
    out: Path = Path(__file__).resolve().parent
    """The folder of the prompt files."""
    n_prompts: int = 250
    name_tokens: int | None = None
    """How many tokens a name has; the commonest number if none."""
    model_name: str = "pythia-2.8b-deduped"
    """For the name of the file."""


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    file = sports_players_prompts(
        config.load_tokenizer(), config.n_prompts, config.seed, config.name_tokens
    )
    path = config.out / f"sports_players_{config.model_name}_prompts.json"
    file.write(path, config.stated_name)
