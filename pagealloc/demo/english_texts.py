"""Fixed English texts, a little over 512 tokens each, on which perplexity is measured."""

from pagealloc.demo.conversations import SYSTEM_PROMPT

__all__ = ["TEXTS", "TEXT_TOKENS"]

TEXT_TOKENS = 512

STORY = """\
The ferry left the harbour a little before sunrise, while the town was still asleep. A thin fog \
lay on the water, and the lamps along the quay looked like small moons that somebody had hung \
there and forgotten. Anna stood at the rail with her hands in the pockets of her coat and \
watched the houses grow smaller. She had lived in one of them for thirty years, and she had \
never seen it from this side.

There were only a few passengers. An old man with a basket of eggs had fallen asleep on a bench \
near the engine room, because it was warm there. Two students were arguing about an examination \
that they had both failed. A mother was trying to explain to her daughter why the boat did not \
sink, although it was made of iron. "It is because of the air inside," she said. "The ship is \
mostly air, and the water that it pushes away is heavier than the ship." The girl thought about \
this for a long time and then asked whether the fish knew.

When the sun came up, the fog turned yellow and then disappeared. The island lay in front of \
them, much closer than Anna had expected. It was not large. One could walk around it in a day, \
if one did not stop to look at anything. In the middle there was a hill with a white church, and \
below the hill the fields came down to the sea in narrow steps, each of them held by a wall of \
grey stones. Her grandfather had built some of these walls. He used to say that a wall is never \
finished, because the rain takes a stone every winter, and in spring somebody has to put it \
back.

The captain, who had known him, came down from the bridge and stood beside her. He asked how \
long she wanted to stay. She answered that she did not know yet. There was a house to be sold, \
or perhaps to be kept, and there were papers to be signed in an office that was open for two \
hours a week. The captain laughed. He told her that the man in the office was his cousin, that \
he was never in a hurry, and that it would be wise to bring him a cake. "People think that time \
is the same everywhere," he said, "but here it is measured by the boat. If you miss the one on \
Friday, it is simply Friday for another week."

They landed at eight. A boy caught the rope and tied it to an iron ring without looking at it, \
as he had probably done a thousand times. The old man woke up, counted his eggs, and was the \
first to go ashore. Anna waited until everybody had left. Then she picked up her bag, thanked \
the captain, and walked slowly up the path between the walls, where the grass was still wet and \
the first bees were already at work.
"""

EXPLANATION = """\
Bread is made of four things: flour, water, salt and yeast. What turns them into a loaf is time, \
and most of what a baker does is to decide how much of it the dough gets, and at what \
temperature.

When flour meets water, two of its proteins join into a net called gluten. The net is weak at \
first. Kneading pulls its threads in one direction and makes it strong, but a dough that rests \
overnight in a cold room becomes just as strong without any work, because the threads find each \
other by themselves. This is why old recipes often ask for little kneading and a long night.

Yeast is a living thing. It eats the sugar in the flour and gives off carbon dioxide and a little \
alcohol. The gas cannot leave the dough, since the net of gluten holds it back like the skin of a \
balloon, and so the dough rises. In a warm kitchen this takes about an hour. At the temperature \
of a refrigerator it takes a day, and the bread tastes better, because other bacteria have time to \
make acids while the yeast is slow. A dough that has risen for too long collapses: the sugar is \
gone, the acids have made the net soft, and the bubbles run into each other.

Salt does two things. It gives taste, and it slows the yeast down. A dough without salt rises \
fast, tears easily and tastes of nothing. Two grams of salt for every hundred grams of flour are \
enough.

In the oven the bread rises once more. For the first ten minutes the gas in the bubbles expands, \
and the yeast works faster and faster until it dies at about sixty degrees. Then the starch in \
the flour swells and becomes firm, the water in the dough turns into steam, and the crust dries \
and turns brown. Bakers pour water into the hot oven at the beginning, since steam keeps the \
surface soft while the bread still grows. Without it the crust would be hard too early and would \
break at the weakest place. That is also the reason for the cuts on top of a loaf: they decide \
where it breaks.

A loaf is done when it sounds hollow if one knocks on its underside, or when a thermometer in its \
middle shows ninety-six degrees. It should not be cut at once. Inside, the starch is still \
setting, and steam is still on its way out through the crust. After an hour on a wire rack the \
crumb is firm and dry enough for a knife. Bread that was cut while it was hot is damp inside, and \
it becomes stale sooner.

Stale bread is not dry bread. It has lost almost no water. Its starch has gone back to a hard \
form, and warmth undoes that for a while, which is why a slice of yesterday's bread tastes fresh \
again when it comes out of the toaster.
"""

TEXTS = {"story": STORY, "handbook": SYSTEM_PROMPT, "explanation": EXPLANATION}
"""Each has at least `TEXT_TOKENS` tokens."""
