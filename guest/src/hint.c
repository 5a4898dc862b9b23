/*
 * Free page hints, virtio 1.2 section 5.5.6.5. The device sets a command id; the driver sends the id, its free memory and
 * STOP, in this order on one queue. It does not use hinted memory until the command is DONE. Or it takes memory back
 * before, and then must write it first; hint_race tests that.
 */
#include "devices.h"
#include "pool.h"
#include "work.h"

#define COMMAND_STOP 0
#define COMMAND_DONE 1
#define QUEUE 3

#define AT_ONCE 8 /* blocks for each step */
#define COMMANDS 8

u64 hinted_pages, hint_rounds, hint_race;
bool hints_wanted = true;

static struct queue hints;
static u32 commands[COMMANDS], commands_sent; /* a command must not change until its buffer is used */
static u32 commands_out;
static u32 current; /* the id that is being answered; STOP: none */
static u32 last;    /* the last command of the device */
static u32 at;      /* the next block to hint */
static u32 turn;    /* number of hinted blocks */
static bool stopping; /* STOP is to be sent */
static bool starting; /* `current` is to be sent, after STOP */
static bool over = true; /* the last command was DONE, or there was none */
static bool anew;        /* this is the first id after DONE: free and hint again the blocks that were taken back */

#define TOKEN_COMMAND 1

void hint_init(struct virtio *d)
{
	virtio_queue(d, &hints, QUEUE);
}

static bool say(u32 command, bool kick)
{
	if (commands_out == COMMANDS)
		return false;
	u32 *place = &commands[commands_sent % COMMANDS];
	*place = command;
	struct piece p = {place, sizeof *place};
	if (!queue_add(&hints, &p, 1, 0, TOKEN_COMMAND))
		return false;
	commands_sent++;
	commands_out++;
	if (kick)
		queue_kick(&hints);
	return true;
}

/* After DONE the guest may use hinted blocks again. */
static void release(void)
{
	for (u32 i = 0; i < pool_blocks; i++)
		if (block_state(&pool[i]) == BLOCK_HINTED)
			block_become(&pool[i], BLOCK_FREE);
}

void hint_command(u32 command)
{
	if (command == last || !hints_wanted)
		return;
	last = command;
	stopping = current != COMMAND_STOP;
	current = COMMAND_STOP;
	if (command == COMMAND_DONE) {
		release();
		over = true;
	}
	if (command == COMMAND_STOP || command == COMMAND_DONE)
		return;
	current = command;
	anew = over;
	over = false;
	starting = true;
	at = 0;
}

/* Hints a block; true if it was also filled, which takes time. quiet: do not notify the device yet. */
static bool hint(struct block *b, bool *kick, bool quiet)
{
	if (anew && block_state(b) == BLOCK_FULL && (b->note & NOTE_RETAKEN))
		block_free(b); /* it was taken back under an id before DONE */
	if ((block_state(b) != BLOCK_FREE && block_state(b) != BLOCK_HINTED) || !block_version(b))
		return false;
	struct piece p = {block_page(b, 0), b->pages * PAGE};
	queue_add(&hints, &p, 0, 1, 0);
	block_become(b, BLOCK_HINTED);
	block_flag(b, NOTE_HINTED, 0);
	hinted_pages += b->pages;
	*kick = true;
	if (!hint_race || turn++ % hint_race)
		return false;
	/*
	 * The buffer is available, and the guest takes the block back. Alternately it notifies the device before and after
	 * it rewrites the pages (a polling device may see the buffer earlier): both are allowed. For the first blocks, it
	 * notifies the device after all of them are rewritten.
	 */
	if (!quiet && turn / hint_race % 2) {
		queue_kick(&hints);
		*kick = false;
	}
	block_retake(b);
	return true;
}

void hint_step(u64 *next)
{
	u32 token, length;
	while (queue_take(&hints, &token, &length))
		if (token == TOKEN_COMMAND)
			commands_out--;
	if (stopping)
		stopping = !say(COMMAND_STOP, true);
	if (stopping || current == COMMAND_STOP)
		return;
	bool first = starting && hint_race;
	if (starting) {
		starting = !say(current, !first);
		if (starting)
			return;
	}
	bool kick = first, enough = false;
	for (u32 n = 0; n < AT_ONCE && !enough && at < pool_blocks && hints.room > 1; n++)
		enough = hint(&pool[at++], &kick, first) && !first;
	if (kick)
		queue_kick(&hints);
	if (at >= pool_blocks && say(COMMAND_STOP, true)) {
		current = COMMAND_STOP;
		hint_rounds++;
		turn++; /* other blocks are taken back in the next round */
	}
	if (current != COMMAND_STOP && hints.room > 1)
		*next = tsc();
}
