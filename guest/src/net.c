/*
 * The network, virtio 1.2 section 5.1: one address that answers ARP (RFC 826), ping (RFC 792) and UDP's echo port (RFC
 * 862), and is announced when the host requests it (section 5.1.6.5.4).
 */
#include "devices.h"
#include "serial.h"
#include "work.h"

#define FEATURE_MAC (1UL << 5)
#define FEATURE_STATUS (1UL << 16)
#define FEATURE_CONTROL (1UL << 17)
#define FEATURE_ANNOUNCE (1UL << 21)
#define FEATURE_MQ (1UL << 22) /* not accepted: without it the control queue is number 2 */

#define CONFIG_STATUS 4 /* in the upper half; the lower half is the end of the MAC address */
#define STATUS_ANNOUNCE 2
#define CONTROL_ANNOUNCE 3 /* class; command 0 is the acknowledgement */

#define HEADER 12 /* struct virtio_net_hdr with num_buffers, section 5.1.6 */
#define FRAME 1526
#define BUFFERS 32 /* for each direction */

#define ETHERNET 14
#define TYPE_ARP 0x0806
#define TYPE_IP 0x0800
#define PROTOCOL_ICMP 1
#define PROTOCOL_UDP 17
#define ECHO_PORT 7

struct virtio net_device;
u64 net_received, net_sent, net_announced;

static struct queue receive, transmit, control;
static u8 received[BUFFERS][2048], sent[BUFFERS][2048];
static u32 sending;    /* bit i: the device has sent[i] */
static bool drop_kick; /* buffers were made available, and the device is not notified yet */
static u8 mac[6];
static u32 address;
static bool acknowledging;
static struct {
	u8 class, command, answer;
} order;

static u32 get16(const u8 *at) { return at[0] << 8 | at[1]; }
static u32 get32(const u8 *at) { return get16(at) << 16 | get16(at + 2); }

static void put16(u8 *at, u32 value)
{
	at[0] = value >> 8;
	at[1] = value;
}

static void put32(u8 *at, u32 value)
{
	put16(at, value >> 16);
	put16(at + 2, value);
}

static void copy(u8 *to, const u8 *from, u32 n)
{
	while (n--)
		*to++ = *from++;
}

static void give_buffer(u32 i)
{
	struct piece p = {received[i], HEADER + FRAME};
	queue_add(&receive, &p, 0, 1, i);
}

void net_init(void)
{
	struct virtio *d = &net_device;
	if (!virtio_open(d, VIRTIO_NET, FEATURE_MAC | FEATURE_STATUS | FEATURE_CONTROL | FEATURE_ANNOUNCE, 2) ||
	    !virtio_queue(d, &receive, 0) || !virtio_queue(d, &transmit, 1))
		return;
	if ((d->features & FEATURE_CONTROL) && !virtio_queue(d, &control, 2))
		return;
	u32 low = virtio_config32(d, 0), high = virtio_config32(d, 4);
	for (u32 i = 0; i < 6; i++)
		mac[i] = i < 4 ? low >> 8 * i : high >> 8 * (i - 4);
	if (!(d->features & FEATURE_MAC))
		copy(mac, (const u8 *)"\x52\x54\0gv", 6);
	for (u32 i = 0; i < BUFFERS; i++)
		give_buffer(i);
	virtio_start(d);
	queue_kick(&receive);
	struct line l = {0};
	put(&l, "net: ");
	for (u32 i = 0; i < 6; i++) {
		if (i)
			put_char(&l, ':');
		put_char(&l, "0123456789abcdef"[mac[i] >> 4]);
		put_char(&l, "0123456789abcdef"[mac[i] & 15]);
	}
	if (!d->messages)
		put(&l, ", without MSI-X");
	serial_line(&l);
}

/* Returns a free frame, after its header; 0: all are being sent. */
static u8 *new_frame(void)
{
	for (u32 i = 0; i < BUFFERS; i++)
		if (!(sending >> i & 1)) {
			for (u32 b = 0; b < HEADER; b++)
				sent[i][b] = 0;
			return sent[i] + HEADER;
		}
	return 0;
}

static void send(u8 *frame, u32 length)
{
	u32 i = (frame - HEADER - sent[0]) / sizeof sent[0];
	struct piece p = {sent[i], HEADER + length};
	if (!queue_add(&transmit, &p, 1, 0, i))
		return;
	sending |= 1U << i;
	net_sent++;
	queue_kick(&transmit);
}

static void ethernet(u8 *frame, const u8 *to, u32 type)
{
	copy(frame, to, 6);
	copy(frame + 6, mac, 6);
	put16(frame + 12, type);
}

static void send_arp(const u8 *to, u32 operation, const u8 *target_mac, u32 target)
{
	static const u8 kinds[] = {0, 1, 8, 0, 6, 4};
	u8 *f = new_frame();
	if (!f)
		return;
	ethernet(f, to, TYPE_ARP);
	u8 *arp = f + ETHERNET;
	copy(arp, kinds, 6);
	put16(arp + 6, operation);
	copy(arp + 8, mac, 6);
	put32(arp + 14, address);
	copy(arp + 18, target_mac, 6);
	put32(arp + 24, target);
	send(f, ETHERNET + 28);
}

/* Announces the address by an ARP request for it. */
static void announce(void)
{
	static const u8 everybody[] = {255, 255, 255, 255, 255, 255}, nobody[6];
	if (address)
		send_arp(everybody, 1, nobody, address);
}

void net_address(u32 ip)
{
	address = ip;
	if (net_device.there)
		announce();
}

static u32 sum(const u8 *at, u32 n)
{
	u32 total = 0;
	for (; n > 1; n -= 2, at += 2)
		total += get16(at);
	if (n)
		total += at[0] << 8;
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return total;
}

/* Makes a reply to an IP packet, with the same content; the caller changes what follows the IP header. */
static u8 *reply(const u8 *ip, const u8 *frame, u32 length)
{
	u8 *f = new_frame();
	if (!f)
		return 0;
	ethernet(f, frame + 6, TYPE_IP);
	u8 *to = f + ETHERNET;
	copy(to, ip, length);
	copy(to + 12, ip + 16, 4);
	copy(to + 16, ip + 12, 4);
	to[8] = 64; /* hops */
	put16(to + 10, 0);
	put16(to + 10, ~sum(to, (ip[0] & 15) * 4));
	return f;
}

static void answer_ip(const u8 *frame, u32 length)
{
	const u8 *ip = frame + ETHERNET;
	u32 header = (ip[0] & 15) * 4, total = get16(ip + 2);
	if (length < ETHERNET + 20 || ip[0] >> 4 != 4 || header < 20 || total < header + 8 || total > length - ETHERNET)
		return;
	if (get32(ip + 16) != address || sum(ip, header) != 0xffff || (get16(ip + 6) & 0x3fff))
		return; /* fragments are not supported */
	const u8 *body = ip + header;
	u32 n = total - header;
	u8 *f;
	if (ip[9] == PROTOCOL_ICMP && body[0] == 8 && body[1] == 0 && sum(body, n) == 0xffff &&
	    (f = reply(ip, frame, total))) {
		u8 *to = f + ETHERNET + header;
		to[0] = 0; /* echo reply */
		put16(to + 2, 0);
		put16(to + 2, ~sum(to, n));
		send(f, ETHERNET + total);
	} else if (ip[9] == PROTOCOL_UDP && get16(body + 2) == ECHO_PORT && get16(body) != ECHO_PORT &&
		   (f = reply(ip, frame, total))) {
		/* Addresses and ports are swapped, so the checksum does not change. */
		u8 *to = f + ETHERNET + header;
		copy(to, body + 2, 2);
		copy(to + 2, body, 2);
		send(f, ETHERNET + total);
	}
}

static void answer(const u8 *frame, u32 length)
{
	if (!address || length < ETHERNET + 8)
		return;
	const u8 *arp = frame + ETHERNET;
	if (get16(frame + 12) == TYPE_IP)
		answer_ip(frame, length);
	else if (get16(frame + 12) == TYPE_ARP && length >= ETHERNET + 28 && get16(arp + 6) == 1 && get32(arp + 24) == address)
		send_arp(arp + 8, 2, arp + 8, get32(arp + 14));
}

/* Section 5.1.6.5.4.1: packets first, then the acknowledgement. */
static void look_at_status(void)
{
	if (!(net_device.features & FEATURE_ANNOUNCE) || acknowledging)
		return;
	if (!(virtio_config32(&net_device, CONFIG_STATUS) >> 16 & STATUS_ANNOUNCE))
		return;
	announce();
	net_announced++;
	order.class = CONTROL_ANNOUNCE;
	order.command = 0;
	struct piece pieces[] = {{&order, 2}, {&order.answer, 1}};
	acknowledging = queue_add(&control, pieces, 1, 1, 0);
	queue_kick(&control);
}

void net_step(u64 now, u64 *next)
{
	u32 i, length;
	if (!net_device.there)
		return;
	while (queue_take(&transmit, &i, &length))
		if (i < BUFFERS)
			sending &= ~(1U << i);
	for (u32 n = 0; n < BUFFERS && queue_take(&receive, &i, &length); n++) {
		if (i >= BUFFERS)
			continue;
		net_received++;
		if (length > HEADER && length <= HEADER + FRAME)
			answer(received[i] + HEADER, length - HEADER);
		give_buffer(i);
		drop_kick = true;
	}
	if (drop_kick)
		queue_kick(&receive);
	drop_kick = false;
	if (acknowledging && queue_take(&control, &i, &length))
		acknowledging = false;
	if (virtio_changed(&net_device, now, next))
		look_at_status();
	if (!net_device.messages && address)
		sooner(next, now + clock_ms(1));
}
