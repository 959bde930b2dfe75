/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Constants of the kernel that are preprocessor macros there, so that BTF does not know them. */
#ifndef NETOKEN_KERNEL_H
#define NETOKEN_KERNEL_H

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2

/* include/net/ipv6.h */
#define NEXTHDR_HOP 0
#define NEXTHDR_ROUTING 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_DEST 60

#ifndef NULL
#define NULL ((void *)0)
#endif
#ifndef offsetof
#define offsetof(type, member) __builtin_offsetof(type, member)
#endif

#endif
