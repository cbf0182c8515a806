"""Stories without end, made by rule: text of our own to try training on, and to ship a model of.

Each is drawn from its number alone, so any of them can be made again. They are plain on purpose: a
few names, a want, a hindrance, a way out and a thought at the end, told so that who and what recur
as a reader expects.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_GIRLS = "Mia,Lily,Anna,Sue,Rosa,Nora,Ella,Zoe,Ida,Clara".split(",")
_BOYS = "Tom,Ben,Max,Sam,Leo,Tim,Jack,Finn,Otto,Paul".split(",")
_BEASTS = "cat,dog,rabbit,bear,fox,mouse,bird,frog,duck,hedgehog,squirrel,turtle".split(",")
_BEAST_NAMES = "Pip,Fluffy,Bruno,Dot,Coco,Button,Pebble,Momo,Hazel,Biscuit".split(",")
_TRAITS = "little,brave,curious,kind,shy,cheerful,clever,quiet,sleepy,merry".split(",")
_PLACES = (
    "a house near the forest,a village by the sea,a town with a tall clock,a farm on a hill,"
    "a cottage beside a lake,a garden full of flowers"
).split(",")
_TIMES = "One sunny morning,One day,One windy afternoon,One cold evening,One rainy day".split(",")
_THINGS = (  # what it is, what colour it may have, where it gets lost
    ("ball", "red,blue,yellow,green", "under the bed,in the tall grass,behind the shed"),
    ("kite", "red,blue,orange,purple", "in a tall tree,on the roof,in the bushes"),
    ("boat", "small,white,wooden", "on the pond,under the bridge,between the stones"),
    ("hat", "big,warm,green,straw", "in the river,on the fence,in the mud"),
    ("key", "golden,old,silver,tiny", "in the sand,under a leaf,inside a shoe"),
    ("drum", "loud,red,round", "in the attic,behind the door,under the stairs"),
    ("lamp", "bright,old,little", "in the cellar,on the highest shelf,behind the books"),
    ("blanket", "soft,warm,blue", "in the barn,under the table,on the swing"),
)
_FOODS = "an apple,a cake,some bread,a cookie,a bowl of soup,some berries,a pie,a carrot".split(",")
_LESSONS = (
    "it is good to share with others",
    "friends help each other",
    "it is brave to say sorry",
    "asking for help is never wrong",
    "patience makes hard things easy",
    "a kind word can change a whole day",
    "telling the truth makes the heart light",
    "you can try again when something goes wrong",
)


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    he: str
    him: str
    his: str
    what: str  # "girl", "fox"

    @property
    def He(self) -> str:
        return self.he.capitalize()


def stories(count: int, first: int = 0) -> Iterator[str]:
    """Those numbered from `first` on."""
    for number in range(first, first + count):
        yield story(number)


def story(number: int) -> str:
    chance = random.Random(f"story {number}")
    hero, friend = _figures(chance)
    tell = chance.choice((_lost, _shared, _afraid, _built, _quarrel, _guest))
    trait, place = chance.choice(_TRAITS), chance.choice(_PLACES)
    begin = chance.choice(
        (
            f"Once upon a time there was a {trait} {hero.what} named {hero.name}.",
            f"{hero.name} was a {trait} {hero.what}.",
            f"There once was a {trait} {hero.what} whose name was {hero.name}.",
        )
    )
    home = chance.choice(
        (f"{hero.He} lived in {place}.", f"{hero.name} lived in {place} with {hero.his} mother.")
    )
    parts = [f"{begin} {home}", *tell(chance, hero, friend), _end(chance, hero, friend)]
    return "\n".join(parts)


def _figures(chance: random.Random) -> tuple[_Figure, _Figure]:
    def one(taken: str) -> _Figure:
        kind = chance.randrange(3)
        names = (_GIRLS, _BOYS, _BEAST_NAMES)[kind]
        name = chance.choice([n for n in names if n != taken])
        she = kind == 0 or (kind == 2 and chance.random() < 0.5)
        words = ("she", "her", "her") if she else ("he", "him", "his")
        return _Figure(name, *words, what=("girl", "boy", chance.choice(_BEASTS))[kind])

    hero = one("")
    return hero, one(hero.name)


def _lost(chance: random.Random, hero: _Figure, friend: _Figure) -> tuple[str, ...]:
    thing, colours, wheres = chance.choice(_THINGS)
    colour, where = chance.choice(colours.split(",")), chance.choice(wheres.split(","))
    looked = [w for w in wheres.split(",") if w != where]
    return (
        f"{hero.name} had a {colour} {thing} and loved it very much. "
        f"{chance.choice(_TIMES)} the {thing} was gone. "
        f'"Where is my {thing}?" {hero.name} asked. {hero.He} looked {chance.choice(looked)}, but it '
        f"was not there. {hero.name} was {chance.choice(('sad', 'worried', 'close to tears'))}.",
        f'Then {friend.name} the {friend.what} came by. "Why are you sad?" asked {friend.name}. '
        f'"I lost my {colour} {thing}," said {hero.name}. "{_help(chance)}" said {friend.name}. '
        f"They looked and looked. At last {friend.name} saw something {colour} {where}. "
        f'"I found it!" {friend.he} called. It was the {thing}! {hero.name} '
        f"{chance.choice(('jumped for joy', 'laughed', 'hugged the ' + thing))} and thanked "
        f"{friend.him}.",
    )


def _shared(chance: random.Random, hero: _Figure, friend: _Figure) -> tuple[str, ...]:
    food = chance.choice(_FOODS)
    own = food.split(" ", 1)[1]
    return (
        f"{chance.choice(_TIMES)} {hero.name}'s mother gave {hero.him} {food}. {hero.name} was very "
        f"happy, for {hero.he} was hungry. {hero.He} sat down under a tree to eat.",
        f"Just then {friend.name} the {friend.what} walked past. {friend.name} looked at the {own} "
        f'and said, "I have not eaten all day." {hero.name} thought for a moment. The {own} smelled '
        f'so good! But {hero.he} smiled and said, "{_share(chance)}" So they ate together, and the '
        f"{own} tasted even better than before.",
    )


def _afraid(chance: random.Random, hero: _Figure, friend: _Figure) -> tuple[str, ...]:
    fear, proof = chance.choice(
        (
            ("the dark", "a night with a round moon and a thousand stars"),
            ("deep water", "cool water that carried them like a soft bed"),
            ("thunder", "a loud drum in the sky that could do no harm"),
            ("high places", "a whole valley, green and small and beautiful"),
        )
    )
    return (
        f"{hero.name} was not afraid of much, but {hero.he} was afraid of {fear}. {hero.He} did not "
        f"tell anybody, because {hero.he} thought that all others would laugh.",
        f'{chance.choice(_TIMES)} {friend.name} the {friend.what} asked, "Why do you never come with '
        f'me?" {hero.name} looked at {hero.his} feet. "I am afraid of {fear}," {hero.he} whispered. '
        f'{friend.name} did not laugh. "{_brave(chance)}" {friend.he} said. They went together, hand '
        f"in hand, very slowly. And what did {hero.name} find? It was {proof}. "
        f'"It is not so bad at all," said {hero.name}.',
    )


def _built(chance: random.Random, hero: _Figure, friend: _Figure) -> tuple[str, ...]:
    made, of = chance.choice(
        (
            ("a tower", "stones"),
            ("a tree house", "boards"),
            ("a bridge", "branches"),
            ("a snowman", "snow"),
            ("a castle", "sand"),
            ("a raft", "logs"),
        )
    )
    thing = made.split(" ", 1)[1]
    return (
        f"{chance.choice(_TIMES)} {hero.name} wanted to build {made}. {hero.He} took {of} and began. "
        f"But each time the {thing} was nearly done, it fell down. {hero.name} got angry and "
        f'kicked the {of}. "I cannot do it!" {hero.he} cried.',
        f'{friend.name} the {friend.what} had watched. "May I hold one side?" {friend.he} asked. '
        f"{hero.name} nodded. One held, the other built, and they did not hurry. In the evening the "
        f"{thing} stood, and it did not fall. It was the best {thing} that anyone had ever seen. "
        f'"We did it," said {hero.name}, and {friend.name} smiled.',
    )


def _quarrel(chance: random.Random, hero: _Figure, friend: _Figure) -> tuple[str, ...]:
    thing, colours, _ = chance.choice(_THINGS)
    colour = chance.choice(colours.split(","))
    return (
        f"{hero.name} and {friend.name} the {friend.what} were playing with a {colour} {thing}. "
        f'"It is mine!" said {hero.name}. "No, it is mine!" said {friend.name}. They pulled and '
        f"pulled, and then the {thing} broke. Both were very quiet. {friend.name} went home alone.",
        f"That night {hero.name} could not sleep. In the morning {hero.he} took some glue and mended "
        f"the {thing}. Then {hero.he} carried it to {friend.name}'s door. "
        f'"I am sorry," said {hero.name}. "I am sorry, too," said {friend.name}. They played with the '
        f"{colour} {thing} all day long, each in turn.",
    )


def _guest(chance: random.Random, hero: _Figure, friend: _Figure) -> tuple[str, ...]:
    food = chance.choice(_FOODS)
    return (
        f"{chance.choice(_TIMES)} there was a knock at the door. {hero.name} opened it, and there "
        f'stood a wet {friend.what}. "My name is {friend.name}," said the {friend.what}. "I have lost '
        f'my way, and it is so cold outside." {hero.name} did not think twice. "Come in!" {hero.he} '
        "said.",
        f"{hero.name} made a fire and brought {food}. {friend.name} ate and grew warm and told of far "
        f'countries. When the rain was over, {friend.name} said, "You opened your door for me, and I '
        f'will not forget it." From that day on {friend.he} came every week, and each time '
        f"{friend.he} brought {hero.name} something beautiful.",
    )


def _end(chance: random.Random, hero: _Figure, friend: _Figure) -> str:
    lesson = chance.choice(_LESSONS)
    return chance.choice(
        (
            f"{hero.name} and {friend.name} were best friends from then on. They learned that {lesson}.",
            f"That day {hero.name} learned that {lesson}. The end.",
            f'"Now I know that {lesson}," said {hero.name}. And they went home happily.',
        )
    )


def _help(chance: random.Random) -> str:
    return chance.choice(
        ("Do not worry, I will help you!", "Let us look together!", "I have good eyes!")
    )


def _share(chance: random.Random) -> str:
    return chance.choice(
        ("Here, have half of it.", "Come and eat with me!", "There is enough for two.")
    )


def _brave(chance: random.Random) -> str:
    return chance.choice(
        ("Everybody is afraid of something.", "I will stay with you.", "Take my hand.")
    )
