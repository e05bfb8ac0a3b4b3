/* What scripts/ucx-bindings reads: everything else comes in through it. */
#include <ucp/api/ucp.h>
