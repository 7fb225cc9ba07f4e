"""Twenty prompts of many kinds, for comparisons of whole paths."""

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "1, 1, 2, 3, 5, 8, 13,",
    "Ingredients: 200 g flour, 3 eggs, 1 pinch of salt. Method:",
    "Der schnelle braune Fuchs springt über",
    "Q: Why is the sky blue?\nA:",
    "SELECT name, count(*) FROM orders",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "The mitochondrion is",
    "In 1969, the first human beings",
    "import numpy as np\n\nx = np.linspace(0, 1, 100)\n",
    "Roses are red,\nviolets are blue,\n",
    "The three laws of thermodynamics say that",
    "{\"name\": \"Ada\", \"age\": 36, \"languages\": [",
    "To be, or not to be, that is",
    "To install the package, run the following commands:\n```bash\n",
    "She opened the letter with trembling hands. Inside,",
    "Chapter 4: Memory management. An operating system keeps track of",
    "今日は",
)  # fmt: skip
