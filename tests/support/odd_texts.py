"""Texts that are hard to split into words, as strategies of Hypothesis, and parameters of Punkt."""

from __future__ import annotations

from hypothesis import strategies as st

# Enough for Punkt to learn words that begin sentences, collocations and abbreviations.
TEXT = [
    "Mr. Smith went to Washington, D.C., on Jan. 5 of that year. He didn't say much. The chairman, Dr. J. Jones, did. "
    "No. 5 lost to No. 7 in the U.S. Open. the men of St. Mary's said so. Sen. A. Brown agreed. But he left. It rained."
] * 50

BLANKS = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
    "",
]
MARKS = list(".?!,:;'\"`´‘’‚“”„«»‹›()[]{}<>-‐–—―…*&%$#@£€/\\|~^_=+")
LETTERS = [
    *"aAbdDeiIlLmMnNrRsSTtvVyY019",
    "İ",
    "ı",
    "ſ",
    "K",
    "é",
    "ß",
    "Σ",
    "e\u0301",
    "٣",
    "²",
    "日",
    "。",
    "😀",
    "\u200d",
    "\0",
    "\ufeff",
]
TOKENS = """
    a x go Go word Word. I A. J. Mr. Mr U.S. D.C. No. St. Jan. Jan i.e. 5 5. 5, 1,000 10:30 3.14 -5 2016. 5th 10% $5 #1 @me
    the The he He. But But. however Smith Jones Mary's 5's U.S.'s cannot Cannot, (gonna) wanna gotta lemme gimme d'ye more'n
    'tis 'twas wannabe can not don't Don't, can't. it's It’s boys' boys'. 'em 's 'S n't N'T we'll WE'LL they've I'm I'd
    rock'n'roll 'quoted' "quoted" “quoted” ‘quoted’ "quoted." "quoted". “quoted.” (so.) (so). so.) [sic] a.b a,b a:b ,a :a a: a,
    a,, a:, a,: "a "" '' ``a'' `a' a" a' a'' "' '" ." .' .) .” ?" ! ? ?! !! ... .. . .. .... ….. a... a… -- --- - a--b a-b a—b
    .-- ."-- )-- ( ) " ' ’ ” “ ‘ (" ["a <"a {''a ("a") a. a? a! a?" a!) a.' a.'' a.]} e.g., etc.) etc.). etc., a.”) x's's x's'
    x'S. <unk> http://a.b/c?d=e&f#g a@b.c .5 ,5 5,a 5:a #### ** *a* a;b R&B
""".split()

# Such as Punkt may learn from a text that is no text.
STRANGE = {
    "abbreviations": ["mr", "go", "x", "“a", "”", "’", "'", "5", "a)", "e", "é", "u.s", "word", "quoted", "5th", "b", "-"],
    "collocations": [[".", "a"], ["go", "he"], ["##number##", "the"], ["word", "but"], ["?", "a"], ['"', "he"], ["i", "jones"]],
    "sentence_starters": ["he", "but", "the", "x", "a"],
    "contexts": {word: 2 + 20 * number for number, word in enumerate(["a", "go", "word", "he", "but", "5"])},
}


def text_of(parts: list[str], longest: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), max_size=longest).map("".join)


chunk = st.one_of(st.sampled_from(TOKENS), text_of(MARKS + LETTERS, 6))
chunks = st.lists(st.tuples(chunk, st.sampled_from([" "] * 20 + BLANKS)).map("".join), max_size=12).map("".join)
characters = text_of(BLANKS * 2 + MARKS * 2 + LETTERS, 30)
few_marks = text_of([*MARKS, *"asnt5.", *" " * 12], 12)


odd_texts = st.one_of(chunks, characters, few_marks, st.text(max_size=30))
