/* As in libelf.h. */
#if !__has_include_next(<zlib.h>)
#error "netoken needs the headers of libelf and zlib; run: apt install libelf-dev zlib1g-dev"
#include "see above"
#endif
#include_next <zlib.h>
