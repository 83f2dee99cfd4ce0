"""Faults of text: tokenizers, conversations and answers."""

from __future__ import annotations

from tests.mutations.fault import Fault

CHATS = "tests/mm/data/test_chat.py"
TOKENIZERS = "tests/mm/data/test_tokenizer.py"
ANSWERS = "tests/llm/test_decode.py"
ASKED = "tests/mm/inference/test_generate.py"
EVALUATED = "tests/mm/inference/test_eval.py"
SPREAD = "tests/mm/inference/test_spread.py"

TEXT = (
    Fault(
        "tokenizer.truncation",
        "a truncation that the tokenizer's file stores acts",
        "mm/data/published.py",
        "    core.no_truncation()\n",
        "",
        f"{TOKENIZERS}::test_ids_are_those_of_transformers",
    ),
    Fault(
        "tokenizer.key",
        "lengths are those of another chat template",
        "mm/data/published.py",
        '"" if self.chat is None else self.chat.source',
        '""',
        f"{TOKENIZERS}::test_the_key_is_that_of_ids_template_and_markers",
    ),
    Fault(
        "chat.overlap",
        "a token that begins before its turn is not learned",
        "mm/data/encode.py",
        "stop, at[:, 0], side",
        "start, at[:, 0], side",
        f"{CHATS}::test_overlap_is_that_of_every_pair",
    ),
    Fault(
        "chat.first",
        "the first token of a conversation is learned, with the sample before it",
        "mm/data/encode.py",
        "loss[:1] = False",
        "loss[:0] = False",
        f"{CHATS}::test_the_first_token_is_not_learned",
    ),
    Fault(
        "chat.end",
        "the end of a turn is not learned where the template has no tag",
        "mm/data/chat.py",
        "return at if found is None else after + len(found)",
        "return at",
        f"{CHATS}::test_a_template_without_the_tag_learns_contents_and_ends_of_turns",
    ),
    Fault(
        "chat.markers",
        "a conversation is planned with markers around it",
        "mm/plan/table.py",
        "at = int(sample.markers)",
        "at = 1",
        "tests/mm/data/test_tokens.py::test_rows_of_a_conversation_enter_at_its_placeholder",
    ),
    Fault(
        "decode.position",
        "a next token stands at the beginning of its document",
        "llm/cache.py",
        "self.starts[:-1] - np.asarray(self.past, dtype=np.int64)",
        "self.starts[:-1]",
        f"{ANSWERS}::test_a_token_at_a_time_is_the_whole_document_at_once[rotary]",
    ),
    Fault(
        "decode.window",
        "the convolution forgets the token before",
        "llm/mamba.py",
        "Carry(window[:, 1:], state)",
        "Carry(window[:, :-1], state)",
        f"{ANSWERS}::test_a_token_at_a_time_is_the_whole_document_at_once[Mamba alone]",
    ),
    Fault(
        "decode.limit",
        "a next token sees one key before its window",
        "llm/cache.py",
        "seen &= at > position",
        "seen &= at >= position",
        f"{ANSWERS}::test_a_token_at_a_time_is_the_whole_document_at_once[windows]",
    ),
    Fault(
        "decode.top_p",
        "the token at which the sum reaches top_p is left out",
        "llm/decode.py",
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        f"{ANSWERS}::test_draws_follow_the_probabilities_within_top_p",
    ),
    Fault(
        "prompt.place",
        "rows of a prompt enter one token early",
        "mm/inference/prompt.py",
        "range(len(ids), len(ids) + len(found))",
        "range(len(ids) - 1, len(ids) + len(found) - 1)",
        f"{ASKED}::test_a_prompt_is_what_training_packs",
    ),
    Fault(
        "spread.vocabulary",
        "tokens are chosen from the vocabulary of one tp rank",
        "llm/decode.py",
        "return found if tp.size == 1 else",
        "return found if tp.size > 1 else",
        f"{SPREAD}::test_the_answer_is_that_of_one_process[tp with experts]",
    ),
    Fault(
        "spread.levels",
        "a later stage is given the first level's rows for its own",
        "mm/inference/spread.py",
        "            levels = levels_of(self.cfg, part.stage)\n",
        "            levels = range(len(levels_of(self.cfg, part.stage)))\n",
        f"{SPREAD}::test_each_stage_adds_the_levels_that_enter_there[ME|-*]",
    ),
    Fault(
        "exact.prompt",
        "a question of a data set's sample has its answer in it",
        "mm/inference/exact.py",
        "return {**data, key: data[key][:at]}, answer",
        "return {**data, key: data[key][: at + 1]}, answer",
        f"{EVALUATED}::test_questions_of_samples_end_before_their_answer",
    ),
    Fault(
        "vocabulary.ids",
        "a tokenizer with the same tokens in another order is taken for that of the weights",
        "mm/data/vocabulary.py",
        "if here.get(token) != n",
        "if token not in here",
        "tests/mm/data/test_tokens.py::test_weights_of_another_vocabulary_are_refused_before_anything_runs",
    ),
)
