/* Found before the real one. After an #error a compiler goes on, and buries it; a missing file
 * stops it. */
#if !__has_include_next(<libelf.h>)
#error "netoken needs the headers of libelf and zlib; run: apt install libelf-dev zlib1g-dev"
#include "see above"
#endif
#include_next <libelf.h>
