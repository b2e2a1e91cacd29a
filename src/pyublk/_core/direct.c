/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "direct.h"

#include "work.h"

static enum pu_cut part_by_request(struct pu_work *w, struct pu_part *part)
{
	const struct pu_extent *extent = &w->mapped_parts[w->cut];

	if (w->cut >= w->nr_mapped_parts)
		return PU_NO_PART;
	*part = (struct pu_part){
		.file = extent->file,
		.offset = extent->offset,
		.length = extent->length,
		.first = extent->length,
		.data = extent->start,
	};
	w->cut++;
	return w->cut == w->nr_mapped_parts ? PU_LAST_PART : PU_PART;
}

static enum pu_cut next_part(struct pu_mapped *m, uint16_t tag, struct pu_part *part)
{
	const struct pu_layout *layout = m->layout;
	struct pu_work *w = &m->works[tag];

	if (w->op == PU_OP_FLUSH) {
		while (w->cut < layout->nr_files && layout->files[w->cut].read_only)
			w->cut++;
		*part = (struct pu_part){ .file = (uint32_t)w->cut };
		return w->cut++ < layout->nr_files ? PU_PART : PU_NO_PART;
	}
	if (layout->kind == PU_LAYOUT_PER_REQUEST)
		return part_by_request(w, part);
	return pu_layout_part(layout, w->offset, w->length, &w->cut, part);
}

static const struct pu_policy_functions functions = { .next_part = next_part };

const struct pu_policy pu_direct = { .functions = &functions, .slots_per_tag = 2 };
