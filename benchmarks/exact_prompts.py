"""The prompts for EXACT: conversations, arithmetic word problems, texts to continue, and requests to copy.

None of them is among the prompts of the shipped policies' training text (`dash_runtime/training/prompts.txt`).
"""

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
_EDITED = (
    (
        "Give back this text without spelling mistakes, and change nothing else.",
        "The libary in our town was bult in 1904. It has three floors and a small garden, where peple read in summer. "
        "On the ground floor there are newspapers from twelve countries. The first floor holds novels and poetry, and "
        "the second floor is for children. Every Thursday a volunteer reads stories to the yungest visitors.",
    ),
    (
        "Rewrite this letter. Replace every name Miller by the name Brown, and keep all other words.",
        "Dear Mrs Miller, thank you for your letter of the third of May. We are glad that Mr Miller has recovered and "
        "will be back at work on Monday. Please tell Mr Miller that his desk has moved to the second floor, beside the "
        "meeting room. We look forward to seeing Mrs Miller and Mr Miller at our summer party in June.",
    ),
    (
        "Put this recipe into the past tense, sentence by sentence.",
        "Melt the butter in a large pan. Add the onions and the garlic and cook them for five minutes. Stir in the "
        "flour and pour in the milk, a little at a time. Add the cheese, the salt and the pepper. Pour the sauce over "
        "the potatoes and bake them for forty minutes, until the top is golden.",
    ),
    (
        "Number the sentences of this text and write each on a line of its own.",
        "The expedition left the harbour at dawn. The ship carried forty sailors and two scientists. After nine days "
        "they saw the first ice. The captain ordered a slower speed. On the twelfth day a storm tore the main sail. "
        "Two sailors repaired it during the night. In the morning the sea was calm, and the island lay before them.",
    ),
)
_QUESTIONED = (
    (
        "Which sentences of the text are about the engine? Quote them.",
        "The museum owns a locomotive from 1872. Its engine was built in Leeds and has two cylinders. The wheels were "
        "replaced in 1921. The engine was last fired in 1958, when it pulled a train of eleven wagons. Today the "
        "locomotive stands in the great hall. Visitors may climb into the cab and look at the engine from above.",
    ),
    (
        "List all planets that the text names, each with what the text says about it.",
        "Mercury is the smallest planet and the nearest to the sun. Venus is the hottest planet, because its thick air "
        "keeps the heat. Mars is red, since there is iron in its dust. Jupiter is the largest planet and has a storm "
        "that is older than three centuries. Saturn has rings of ice. Neptune is the farthest planet from the sun.",
    ),
    (
        "Repeat what the witness said, word for word.",
        'The witness told the court: "I left the bakery at ten past seven. A blue van stood in front of the bank with '
        "its engine running. Two men came out of the bank and got into the van. One of them carried a green bag. The "
        'van drove off towards the station." The judge thanked her and closed the session.',
    ),
    (
        "Summarise the minutes below by copying the decision under each heading.",
        "Budget. The board talked for an hour. Decision: the budget of 1,200 dollars is approved. Garden. Three offers "
        "were compared. Decision: the firm Green Fields plants twelve apple trees in October. Website. Nobody was "
        "happy with the old one. Decision: Anna asks two designers for an offer by the end of the month.",
    ),
)
_CODED = (
    (
        "Add a docstring to each function of this module and print the whole module.",
        "def area(width, height):\n    return width * height\n\n\ndef perimeter(width, height):\n    return 2 * "
        "(width + height)\n\n\ndef is_square(width, height):\n    return width == height\n\n\n"
        "def describe(width, height):\n    "
        'return f"{area(width, height)} and {perimeter(width, height)}"\n',
    ),
    (
        "Rename the variable total to amount in this function and print the whole function.",
        "def invoice(items, discount):\n    total = 0\n    for item in items:\n        total += item.price * item.count"
        "\n    if discount:\n        total -= total * discount\n    if total < 0:\n        total = 0\n    print(f'The "
        "total is {total}')\n    return total\n",
    ),
    (
        "Write this JSON again with the port 8080 in place of 80.",
        '{\n  "name": "frontend",\n  "replicas": 3,\n  "image": "registry/frontend:1.4.2",\n  "ports": [{"name": "http'
        '", "port": 80}],\n  "resources": {"cpu": "500m", "memory": "256Mi"},\n  "environment": {"LOG_LEVEL": "info", '
        '"CACHE": "redis", "REGION": "eu-west"}\n}\n',
    ),
    (
        "Turn this list of SQL columns into a CREATE TABLE statement with the same names.",
        "customer_number INTEGER NOT NULL,\nfirst_name VARCHAR(80) NOT NULL,\nlast_name VARCHAR(80) NOT NULL,\n"
        "street_and_number VARCHAR(120),\npostal_code VARCHAR(12),\ncity VARCHAR(80),\ndate_of_birth DATE,\n"
        "last_order_at TIMESTAMP,\nnewsletter BOOLEAN DEFAULT FALSE\n",
    ),
)
COPYING = tuple(f"{task}\n\n{text}" for task, text in (*_EDITED, *_QUESTIONED, *_CODED))
"""Requests whose answers repeat much of what they are given: texts to edit, passages to answer from, code to change."""
