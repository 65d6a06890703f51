"""The built-in pairs of texts: several lengths, long prompts and short ones."""

from ..data.records import Pair

_LETTER = """\
Dear Ms Okafor, the ferry to the island was cancelled on Tuesday morning because of fog, and again
on Tuesday afternoon because the crew had reached the end of its hours. We were told at the pier
that a bus would take us round the bay to the northern landing, where a smaller boat still ran. The
bus came at four, was full after the first thirty of us, and did not come back. Those who stayed
behind slept in the hall of the fishing school, whose caretaker brought blankets and made soup out
of what he had. On Wednesday the large ferry ran again, an hour late, and took everybody at no
extra charge. We ask for the price of the unused hotel night on the island, 84 euros for each of
the seven in our group, and we would like you to thank the caretaker, who refused to take anything
from us. Receipts are attached."""

_TEXTS = (
    (
        "What is the capital of Australia?",
        "Canberra. It was built for that purpose, between Sydney and Melbourne.",
        "Sydney.",
    ),
    (
        "My basil plant droops every afternoon although the soil is damp. What should I do?",
        "Damp soil and drooping leaves usually mean that the roots get too little air. Let the top "
        "two centimetres dry before you water again, check that the pot has a hole, and move the "
        "plant out of the hottest hours of sun. If the roots are brown and soft, cut those off and "
        "repot it in fresh, loose soil.",
        "Give it more water, and then some more. Plants droop when they are thirsty, so a plant "
        "that droops is thirsty.",
    ),
    (
        "Write a function in Python that returns the middle one of three numbers.",
        "def middle(a, b, c):\n    return sorted((a, b, c))[1]",
        "There are many ways to think about this question. A number is in the middle if it is "
        "neither the smallest nor the largest. First one would look for the smallest number, then "
        "for the largest, and then one would take the one that is left. In Python there are "
        "functions for the smallest and the largest number, and with some care about equal numbers "
        "one can use both of them. I hope that this helps you to write the function.",
    ),
    (
        f"Summarize this letter in two sentences.\n\n{_LETTER}",
        "Fog and the crew's hours stranded a group of seven for a night, and only some of the "
        "passengers found room in the replacement bus. They ask for 84 euros each for the unused "
        "hotel night, and for thanks to the caretaker who took them in.",
        "It is a letter about a ferry.",
    ),
    (
        f"How much money does this letter ask for in total?\n\n{_LETTER}",
        "588 euros: 84 euros for each of seven people.",
        "The letter asks for 84 euros.",
    ),
)

PAIRS = tuple(
    Pair(prompt, chosen, rejected, index, f"built-in pair {index + 1}")
    for index, (prompt, chosen, rejected) in enumerate(_TEXTS)
)
