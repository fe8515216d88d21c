/**
 * Classes of characters as lmdist's tokenizers have them, for regular expressions with the flag u or v. JavaScript's own \s and \w
 * are other ones than Python's.
 */

/** Unicode's whitespace. */
export const BLANK = "\\t-\\r\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
/** What Python's str.split() splits at. */
export const SPACE = `${BLANK}\\x1c-\\x1f`;
/** Letters, digits and the underscore. */
export const LETTER = "\\p{L}\\p{N}_";
/** What combines with the character before it: accents, vowel signs, joiners. */
export const MARK = "\\p{M}\\u200c\\u200d";

const SPACES = new RegExp(`[${SPACE}]+`, "u");
const LEADING = new RegExp(`^[${SPACE}]+`, "u");
const TRAILING = new RegExp(`[${SPACE}]+$`, "u");

/**
 * Return what stands between whitespace, as Python's str.split().
 * @param {string} text
 */
export function split(text) {
  return text.split(SPACES).filter(Boolean);
}

/**
 * Return a text without the whitespace at its ends, as Python's str.strip().
 * @param {string} text
 */
export function stripped(text) {
  return withoutTrailingSpace(text).replace(LEADING, "");
}

/**
 * Return a text without the whitespace at its end, as Python's str.rstrip().
 * @param {string} text
 */
export function withoutTrailingSpace(text) {
  return text.replace(TRAILING, "");
}

/**
 * Return the last character of a text, or "".
 * @param {string} text
 */
export function lastCharacter(text) {
  return [...text.slice(-2)].at(-1) ?? "";
}
