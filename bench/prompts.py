"""Texts of exactly so many tokens, no two alike: common English words, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

TRIES = 24  # at exactly so many tokens; most need two
_COMMON = """
a about above across act add after again against age ago agree air all allow almost alone along
already also always among amount an and animal another answer any appear apple are area arm around
arrive art as ask at away baby back bad ball bank base be bear beat beautiful became because become
bed been before began begin behind believe below best better between big bird black blood blow blue
board boat body bone book both bottom box boy branch bread break bridge bright bring broke brother
brought brown build built burn business busy but buy by call came camp can capital captain car care
carry case catch caught cause cell center century certain chair chance change chart check chief
child choose church circle city claim class clean clear climb clock close clothes cloud coast coat
cold collect color column come common company compare complete contain control cook cool copy corn
corner correct cost cotton could count country course cover cow create cross crowd cry current cut
dance dark day dead deal death decide deep degree depend desert design develop did differ direct
discuss distant divide do doctor does dog dollar door down draw dream dress drink drive drop dry
during each ear early earth ease east eat edge effect egg eight either electric else end enemy
energy engine enough enter equal even evening event ever every exact example excite exercise expect
explain eye face fact fair fall family famous far farm fast father favor fear feed feel feet fell
felt few field fight figure fill final find fine finger finish fire first fish fit five flat floor
flow flower fly follow food foot for force forest form forward found four free fresh friend from
front fruit full game garden gas gave general gentle get girl give glad glass go gold gone good got
govern grand grass gray great green grew ground group grow guess guide gun had hair half hand happen
happy hard has hat have he head hear heart heat heavy held help her here high hill him his history
hold hole home hope horse hot hour house how huge human hundred hunt hurry ice idea if imagine in
inch industry insect iron island it job join joy jump just keep kept key kill kind king knew know
lady lake land language large last late laugh law lay lead learn least leave led left leg length
less let letter level lie life lift light like line list listen little live local long look lost lot
loud love low machine made main major make man many map mark market master match material matter may
mean measure meat meet men metal method middle might mile milk million mind mine minute miss modern
moment money month moon more morning most mother motion mountain mouth move much music must name
nation natural nature near need never new next night no noise north nose note nothing notice noun
now number object observe ocean of off offer office often oil old on once one only open opposite or
order other our out over own page paint pair paper parent part party pass past path pattern pay
people perhaps period person picture piece place plain plan plane planet plant play please point
poor position possible post pound power practice prepare present press pretty print problem process
produce product promise proper protect prove provide pull push put question quick quiet quite race
radio rain ran range rather reach read ready real reason receive record red region remember repeat
reply report rest result return rich ride right ring rise river road rock roll room root rope round
row rule run said sail salt same sand save saw say scale school science sea season seat second see
seed seem self sell send sense sentence separate serve set settle seven several shape share sharp
she ship shoe shop short should shoulder shout show side sight sign silent silver similar simple
since sing sister sit size skill skin sky sleep slow small smell smile snow so soft soil soldier
solution some son song soon sound south space speak special speed spell spend spoke spot spread
spring square stand star start state station stay steel step stick still stone stood stop store
story straight strange stream street string strong student study subject sudden sugar suggest summer
sun supply support sure surface surprise swim system table tail take talk tall teach team tell ten
term test than that the their them then there these they thick thin thing think third this those
though thought thousand three through time tiny to together told tone too took tool top total touch
toward town track trade train travel tree trip trouble truck true try turn twenty two type under
unit until up us use usual valley value very view village visit voice wait walk wall want war warm
was wash watch water wave way we wear weather week weight well went were west what wheel when where
which while white who whole why wide wild will win wind window winter wish with woman wonder wood
word work world would write wrong yard year yellow yes yet you young
"""
WORDS = tuple(_COMMON.split())


def word(chance: random.Random) -> str:
    return chance.choice(WORDS) + ("." if chance.random() < 0.08 else "")


async def exactly(
    tokens: int, count: Callable[[list[str]], Awaitable[int]], chance: random.Random
) -> list[str]:
    """Words that `count` says are so many tokens, or nearly where no choice of words was."""
    words = [word(chance) for _ in range(tokens)]
    for _ in range(TRIES):
        counted = await count(words)
        if counted == tokens:
            break
        change = max(1, round(abs(counted - tokens) * len(words) / counted))
        if counted < tokens:
            words += [word(chance) for _ in range(change)]
        else:
            del words[max(1, len(words) - change) :]
    return words
