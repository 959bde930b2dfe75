/* Of the same package as libelf.h, which explains. */
#include <libelf.h>
#include_next <gelf.h>
