"""What happens next in an everyday script (the place of HellaSwag).

People sometimes skip a step: the event marked with a star is left out in two tellings of five. So the
next event is not always certain, and nobody can reach 100 %.
"""

from __future__ import annotations

import random

from sdft_ray.lab.families.item import INES, OTTO, Item
from sdft_ray.lab.families.words import NAMES, pronoun

FAMILY = "scripts"
SKIPPED = 0.4

_SCRIPTS = """
filled the kettle; boiled the water; warmed the pot *; added the tea leaves; poured the tea; drank a cup
woke up early; got out of bed; opened the window *; took a shower; got dressed; ate breakfast
wrote a letter; folded the paper; looked up the address *; closed the envelope; bought a stamp; mailed the letter
dug a hole; planted a tree; watered the roots; put up a fence *; waited a year; picked the fruit
packed a bag; locked the door; walked to the station; bought a ticket *; boarded the train; found a seat
mixed the dough; let it rise; heated the oven; floured the tray *; baked the bread; sliced the loaf
entered the restaurant; sat at a table; read the menu; ordered a meal; thanked the waiter *; paid the bill
sorted the laundry; loaded the machine; added the soap *; started the wash; hung up the clothes; ironed the shirts
cut the wood; measured the boards *; built a shelf; painted it white; let the paint dry; filled it with books
felt a fever; called the doctor; went to the clinic; described the pain *; got a prescription; took the medicine
chose a film; bought popcorn *; entered the cinema; watched the film; left the hall; talked about the ending
laced the skates; stepped on the ice; held the rail *; began to glide; fell down once; got up again
baited the hook; cast the line; waited in silence *; felt a pull; reeled in the fish; cleaned the catch
opened the shop; lit the lamps *; greeted a customer; wrapped the goods; counted the money; closed the shop
saddled the horse; checked the straps *; mounted the horse; rode to the river; let it drink; rode home
found a flat tyre; lifted the car; loosened the bolts *; changed the wheel; lowered the car; drove away
bought a canvas; drew a sketch; mixed the colours *; painted the scene; framed the picture; showed it to friends
joined the choir; learned the song; practised at home *; dressed for the concert; sang on stage; took a bow
swept the floor; filled a bucket; moved the chairs *; mopped the floor; emptied the bucket; let the room dry
heard a knock; put down the book *; went to the door; looked outside; let the guest in; offered some cake
gathered dry sticks; made a fire; set up the tent *; cooked the beans; ate by the fire; went to sleep
"""


def _parse(text: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    scripts = []
    for line in text.strip().splitlines():
        events = [event.strip() for event in line.split(";")]
        optional = next(i for i, event in enumerate(events) if event.endswith("*"))
        scripts.append((tuple(event.removesuffix("*").strip() for event in events), optional))
    return tuple(scripts)


SCRIPTS = _parse(_SCRIPTS)
"""Events in order, and the index of the one that may be skipped."""


def make(rng: random.Random) -> Item:
    """One telling, broken off after two or three events."""
    which = rng.randrange(len(SCRIPTS))
    events, optional = SCRIPTS[which]
    included = [i for i in range(len(events)) if i != optional or rng.random() >= SKIPPED]
    stop = rng.randint(2, len(included) - 1)
    begin = max(0, stop - rng.choice((2, 3)))
    past = [events[i] for i in included[begin:stop]]
    answer = events[included[stop]]
    options = [answer, *_wrong(rng, which, past, answer)]
    rng.shuffle(options)
    name = rng.choice(NAMES)
    who = pronoun(name)
    lead = rng.choice((f"{name} is in the middle of things.", f"Think of what {name} is up to."))
    return Item(
        FAMILY,
        f"{name} {', then '.join(past)}. What did {who} do next?",
        answer,
        "text",
        f"After {who} {past[-1]}, {name} {answer}. Answer: {answer}",
        (
            INES.write(rng, f"{lead} First {who} {past[-1]}, and most people who did that {answer}.", answer),
            OTTO.write(rng, f"{' / '.join(past)} / {answer}, as usual", answer),
        ),
        tuple(options),
    )


def _wrong(rng: random.Random, which: int, past: list[str], answer: str) -> list[str]:
    """Three wrong endings: two from the same script where there are that many, the rest from others."""
    same = [event for event in SCRIPTS[which][0] if event != answer and event not in past]
    wrong = rng.sample(same, min(2, len(same)))
    while len(wrong) < 3:
        event = rng.choice(rng.choice(SCRIPTS)[0])
        if event != answer and event not in wrong and event not in SCRIPTS[which][0]:
            wrong.append(event)
    return wrong
