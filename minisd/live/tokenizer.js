// Stage 5: the tokenizer, CLIP's byte-pair encoding. Beside minisd/tokenizer.py, where a library does the merging.
//
//     "a red Axolotl" ─► clean, split ─► "a" "red" "axolotl" ─► bytes ─► merge ─► a</w> red</w> ax o lot l</w> ─► ids
minisdLive.push(function tokenizer() {
  const [START, END, END_OF_WORD] = ["<|startoftext|>", "<|endoftext|>", "</w>"];
  const SPECIAL = { [START]: "<start>", [END]: "<end>" };
  // English contractions, runs of letters, single digits, and runs of other characters. A merge must not reach across
  // words. (White space is \p{White_Space}: JavaScript's \s lacks U+0085 and has the byte order mark.)
  const words = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\p{White_Space}\\p{L}\\p{N}]+";
  const WORDS = new RegExp(words, "gu");
  const WORDS_AND_SPECIAL = new RegExp(`<\\|startoftext\\|>|<\\|endoftext\\|>|${words}`, "gu");

  // A byte is written as one character, because a vocabulary is a text file: those that Latin-1 shows as a visible
  // character stand for themselves, the others become the characters from U+0100 on (OpenAI, bytes_to_unicode).
  const BYTES = [];
  for (let byte = 0, hidden = 256; byte < 256; byte++) {
    const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    BYTES.push(String.fromCodePoint(visible ? byte : hidden++));
  }

  class BPETokenizer {
    // vocab: the object of vocab.json. merges: the text of merges.txt. config: that of tokenizer_config.json, or none.
    constructor({ vocab, merges, config }) {
      const pad = config?.pad_token?.content ?? config?.pad_token ?? END;
      for (const token of [START, END, pad])
        if (!(token in vocab)) throw new Error(`The vocabulary has no ${token}, which every sentence needs.`);
      const lines = merges.split("\n").filter((line) => line.trim() && !line.startsWith("#version"));
      this.vocab = new Map(Object.entries(vocab));
      this.ranks = new Map(lines.map((line, rank) => [line.trim().split(/\s+/).join(" "), rank]));
      [this.start_token, this.end_token, this.pad_token] = [START, END, pad].map((token) => vocab[token]);
      this.names = new Map(Object.entries(vocab).map(([piece, id]) => [id, piece]));
    }

    // A prompt -> ids: start, the pieces, end, and padding up to max_length. `pieces` names them, and `lost` is the end
    // of a prompt that did not fit.
    encode(prompt, max_length) {
      // A special token that is written out in a prompt becomes that token, before anything else is done.
      const parts = prompt.split(/(<\|startoftext\|>|<\|endoftext\|>)/);
      const words = parts.flatMap((part) => (part in SPECIAL ? part : split(part)));
      const pieces = words.flatMap((word) => this.merge(word).map((piece) => [this.vocab.get(piece), word]));
      const kept = pieces.slice(0, max_length - 2); // start and end take two places
      const padding = Array(max_length - 2 - kept.length).fill(this.pad_token);
      const ids = [this.start_token, ...kept.map(([id]) => id ?? this.end_token), this.end_token, ...padding];
      const lost = pieces.slice(kept.length).map(([, word]) => word);
      return { ids, pieces: this.pieces(ids), lost: lost.filter((word, i) => word !== lost[i - 1]).join(" ") };
    }

    // The word's bytes, of which the neighbours that were merged first in training become one piece, again and again.
    merge(word) {
      if (word in SPECIAL) return [word];
      const pieces = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]);
      pieces.push(pieces.pop() + END_OF_WORD);
      for (;;) {
        let [best, lowest] = [-1, Infinity];
        for (let i = 0; i + 1 < pieces.length; i++) {
          const rank = this.ranks.get(`${pieces[i]} ${pieces[i + 1]}`) ?? Infinity;
          if (rank < lowest) [best, lowest] = [i, rank];
        }
        if (best < 0) return pieces;
        pieces.splice(best, 2, pieces[best] + pieces[best + 1]);
      }
    }

    // In readable form: "<start>", words or pieces of words, "<end>", then "<pad>".
    pieces(ids) {
      const names = ids.map((id) => SPECIAL[this.names.get(id)] ?? this.names.get(id).replace(END_OF_WORD, ""));
      return names.fill("<pad>", ids.indexOf(this.end_token) + 1);
    }
  }

  // Clean and split: one code point for a letter and its accent, one space for a run of them, and lower case. (Letter
  // by letter, because for a whole word JavaScript has a second form of the Greek sigma.)
  function split(text) {
    const clean = text.normalize("NFC").replace(/\p{White_Space}+/gu, " ");
    const lower = Array.from(clean, (letter) => letter.toLowerCase()).join("");
    // What has become a special token only by lower case is one word first, and is taken apart then, as in the library.
    return (lower.match(WORDS_AND_SPECIAL) ?? []).flatMap((word) => word.match(WORDS));
  }

  return { BPETokenizer };
});
