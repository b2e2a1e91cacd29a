/* SPDX-License-Identifier: MIT
 * The policy of tables, stripes and parts by request: a byte is where the layout has it
 */
#ifndef PU_DIRECT_H
#define PU_DIRECT_H

#include "policy.h"

extern const struct pu_policy pu_direct;

#endif
