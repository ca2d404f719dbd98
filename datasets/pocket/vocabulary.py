"""The words of the pocket prompts. Each is one token of the pocket model's tokenizer."""

from __future__ import annotations

NAMES = (
    "Adam Alan Albert Alex Alice Amber Amy Andrew Anna Anthony Arthur Ashley Barbara Ben "
    "Betty Brandon Brian Bruce Carl Carol Charles Chris Claire Crystal Daniel David Dean "
    "Dennis Diana Donald Edward Elizabeth Emily Eric Erin Felix Frances Frank Gary George "
    "Gloria Grace Graham Harry Heather Helen Henry Irene Jack Jacob James Jamie Jane Jason "
    "Jennifer Jessica Joan John Jordan Joseph Joshua Julia Justin Karen Kate Keith Kelly "
    "Kevin Laura Leon Linda Lisa Louis Lucy Marcus Margaret Maria Mark Martin Mary Matthew "
    "Michael Michelle Nathan Nicole Oliver Oscar Patrick Paul Peter Rachel Richard Robert "
    "Rose Ruth Samuel Sarah Simon Sophie Steven Susan Thomas Victor"
).split()[:100]

PLACES = "store park school office garden station market library beach museum".split()
OBJECTS = "drink book ring basket letter flower snack ticket hat key".split()

NOUNS = (
    "war siege reign drought famine voyage strike plague truce festival debate trial "
    "expedition dynasty rebellion exhibition campaign blockade journey feud project mission "
    "alliance tour"
).split()
CENTURIES = tuple(range(11, 18))

ARGUMENTS = (
    "load size files port host path index count width height depth color shape label name "
    "value key mode style format buffer offset limit range start stop step speed angle "
    "weight mass force field image frame page line word letter token block node edge graph "
    "table row column list queue stack tree root leaf user group role state event task job "
    "timer clock signal filter scale"
).split()
FUNCTIONS = "load send parse build draw merge split check update render".split()
DESCRIPTIONS = (
    "first second third main default optional extra total current local global shared"
).split()
"""Descriptions of arguments; they say nothing about which argument it is."""


def all_words() -> list[str]:
    """Every content word, once, in a fixed order."""
    groups = (NAMES, PLACES, OBJECTS, NOUNS, ARGUMENTS, FUNCTIONS, DESCRIPTIONS)
    return list(dict.fromkeys(word for group in groups for word in group))
