"""The date that chat templates render as today, so that thoughts do not depend on the day."""

from __future__ import annotations

# The fallback date of Llama 3.2's template. A macro replaces transformers' function `strftime_now`, since a template's
# arguments are converted to plain data (transformers 5.23).
DATE = "2024-07-26"
_DIRECTIVES = f"""%F {DATE} %Y 2024 %y 24 %m 07 %-m 7 %B July %b Jul %d 26 %-d 26 %e 26 %A Friday %a Fri %j 208
    %T 00:00:00 %H 00 %-H 0 %I 12 %-I 12 %p AM %M 00 %S 00""".split()
_REPLACEMENTS = "".join(map(" | replace('{}', '{}')".format, _DIRECTIVES[::2], _DIRECTIVES[1::2]))
FIXED_DATE = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACEMENTS} }}}}{{% endmacro %}}\n"
