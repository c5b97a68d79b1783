"""The prompts for EXACT: conversations, arithmetic word problems and texts to continue. None of them is among the
prompts of the shipped policies' training text (`dash_runtime/training/prompts.txt`)."""

CHATS = (
    "Why do leaves change their colour in autumn?",
    "I have a job interview tomorrow. What should I prepare?",
    "Explain to a child what gravity is.",
    "Write a short poem about a lighthouse.",
    "What is the difference between a virus and a bacterium?",
    "Give me three ideas for a birthday present for my grandmother.",
    "How do I remove a coffee stain from a white shirt?",
    "Summarise the plot of Romeo and Juliet in a few sentences.",
)
WORD_PROBLEMS = (
    "A gardener plants 14 rows of 23 tulips. Rabbits eat 58 of them. How many tulips are left?",
    "Lisa reads 18 pages on Monday and twice as many on Tuesday. How many pages does she read in all?",
    "A water bottle costs 4 dollars. A team of 11 players needs 3 bottles each. What do they pay?",
    "A train leaves at 9:15 and arrives at 11:40. How many minutes does the journey take?",
    "Peter has 96 stickers and shares them equally among 8 friends. How many does each friend get?",
    "A jacket costs 80 dollars. It is reduced by 15 percent and then by another 10 dollars. What is its price now?",
    "A cyclist rides 24 kilometres in 90 minutes. What is her speed in kilometres per hour?",
    "A bakery sells 45 loaves a day from Monday to Friday and 70 on Saturday. How many loaves does it sell in a week?",
)
TEXTS = (
    "The old harbour had been closed for twenty years when",
    "Photosynthesis is the process by which plants",
    "In the beginning of the nineteenth century, most people travelled",
    'def is_prime(number):\n    """Whether a number is prime."""\n',
    "The three most important things to remember when you learn to swim are",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
    "The Roman Empire reached its greatest extent under",
    "Ingredients: 200 g of flour, two eggs, a cup of milk and a pinch of salt. Preparation:",
)
