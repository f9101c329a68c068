"""A fixed English text, a little over 512 tokens, on which perplexity is measured."""

__all__ = ["ENGLISH_TEXT"]

ENGLISH_TEXT = """\
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
