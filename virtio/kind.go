package virtio

import (
	"context"
	"io"
	"log/slog"
)

// Kind is one kind of device as a machine knows it: an entry of the machine's
// table of kinds (machine.Kinds has the built-in ones, vmm.Config.Kinds adds to
// them). A new kind of device is a package with a Kind, and one line in a table.
type Kind struct {
	// Name names the kind in a machine's description, as a flag and in messages:
	// "disk". Lower-case letters and digits, unlike any other name of the table.
	Name string
	// Max is how many devices of the kind a machine may have; 0: as many as the
	// bus has room for.
	Max int
	// Usage and HereUsage are the help texts of the kind's flag, of the command
	// that starts a machine and of the one that receives it. A value is named in
	// back quotes. "": there is no such flag.
	Usage, HereUsage string
	// Default is the value of a flag without words: whether a machine has the
	// device if nobody says.
	Default bool
	// Parse reads the words of the flag; nil: the flag has none and is on or off.
	Parse func(words string) (Spec, error)
	// ParseHere reads the words of the receiving side's flag, which say what of
	// this host takes the place of the source's.
	ParseHere func(words string) (Spec, error)
	// New returns an empty spec, to be decoded into: a pointer to a struct.
	New func() Spec
	// NewInfo returns an empty description of a device of the kind, to be decoded
	// into from JSON; nil: there is nothing to tell but About.
	NewInfo func() Info
	// About says what a device without description is, for people.
	About string
	// Features are the parts of this kind's specs and saved states that came
	// after v0.1.0 and that this version understands, see [Featured].
	Features []string
}

// Spec is one device as plain data: a part of a machine's description, which
// travels to another host as CBOR. Its dynamic type is a pointer to a struct, all
// of whose fields have cbor tags. A field that is added after v0.1.0 is tagged
// omitzero and belongs to a feature, see [Featured].
type Spec interface {
	// Kind is the name of the spec's kind.
	Kind() string
	// Validate tells why no host could make the device. The host is not asked.
	Validate() error
	// String names the device in a few words, unlike any other of its machine:
	// "disk a.img".
	String() string
	// Open opens what the device needs of this host, and notes in the spec what
	// the guest will be told of it. A spec that has noted that before, here or at
	// the source of a migration, is a promise: Open fails if this host cannot
	// keep it.
	Open(log *slog.Logger) (Backend, error)
}

// Mover is a Spec that names something of its host. A Spec that does so and is no
// Mover, which [Pathed] and [Exclusive] show, is refused by other hosts.
type Mover interface {
	// Move adapts the spec of a guest that has come to this host. here, a spec of
	// the same kind made by [Kind].ParseHere, says what of this host takes the
	// place of the source's; nil: what has the same name, which a destination
	// allows only if it trusts its source. It fails if here asks
	// for what the guest would notice, and if a name that the source gave is a
	// relative path.
	Move(here Spec) error
}

// Renewer is a Spec that has what tells a machine from others, such as an address.
type Renewer interface {
	// Renew gives the device of a guest that is a copy another identity: that of here, a
	// spec made by [Kind].ParseHere, if it has one, otherwise a random one. It comes before
	// Move. here may be nil.
	Renew(here Spec)
}

// Pathed is a Spec that names files of its host. Names travel with the guest, and a
// relative one means another file in another process: so they are made absolute
// where the spec enters.
type Pathed interface {
	// MakeAbsolute makes the names absolute, as [Absolute] does.
	MakeAbsolute() error
}

// Named is a Spec of a device by whose name a destination says which one it means.
type Named interface {
	// DeviceName is a name that the guest knows, such as a disk's id; "": it has none.
	DeviceName() string
	// ForDevice is the name of the guest's device for which a spec is that was made by
	// [Kind].ParseHere; "": it is for the next one.
	ForDevice() string
}

// Worded is a Spec that is made from words.
type Worded interface {
	// Words are those from which [Kind].Parse makes such a spec.
	Words() string
}

// Negotiated is a Spec that promises what the guest's driver has negotiated, not all
// that the device has offered: what nobody uses is no reason to refuse a guest.
type Negotiated interface {
	// Negotiated returns the spec as it is sent when the guest moves to another
	// host. features are those of the driver; all that were offered while it is
	// about to choose, and none if there is no driver.
	Negotiated(d Device, features uint64) Spec
}

// Latecomer is a Spec of a device that uses files and the like of its host later than
// when its machine is made. A process that gives up its rights before its guest runs must
// keep these.
type Latecomer interface {
	// Later returns what is used. arrives is set for a device of a guest that is
	// received: all of it is opened when the guest comes.
	Later(arrives bool) Later
}

// Preparer is a Spec of this host, made by [Kind].ParseHere, that starts something before the
// process gives up its rights, which a device of a guest that comes uses.
type Preparer interface {
	// Prepare starts it. It ends with the process, if nobody uses it. inherits says that a
	// process of this host passes what it has open, see [Heir].
	Prepare(inherits bool) error
}

// Later is what a device of a host uses later. Paths are absolute.
type Later struct {
	Read, Write []string // files that are opened for reading, and for both
	Replace     []string // directories in which files are made and removed
	Listen      bool     // a socket is made in one of Replace
	Netlink     bool     // the kernel is asked about network interfaces
	NetAdmin    bool     // CAP_NET_ADMIN is used, if the process has it
}

// Stayer is a Spec of a device that may be unable to leave its process.
type Stayer interface {
	// Stays tells why the machine can neither be migrated nor saved; nil: it can be.
	Stays() error
}

// Exclusive is a Spec that needs something of the host which only one device of a
// machine can use.
type Exclusive interface {
	// Uses names it: "disk a.img", "tap tap0".
	Uses() []string
}

// Featured is a [Spec] or a [Device] that can say which of its kind's Features
// are in use. The source of a migration names them before anything else is sent,
// and a destination whose Kind does not list one refuses the guest by that name.
// So a host with an older version takes every guest that it can run.
type Featured interface {
	// FeaturesInUse lists features of the kind without which the saved state
	// cannot be understood. What a guest begins to use later, during the
	// migration, must be among them.
	FeaturesInUse() []string
}

// Backend is what a device holds of its host: an open image, a tap. It outlives a
// machine that is reset. Its methods are called one at a time; Info at any time.
//
// A backend that only one process may use at a time is also a [Locker]; one with
// data on its way to storage a [Syncer]; one with data that both sides of a migration
// reach a [Sampler]; one that the network knows an [Announcer].
type Backend interface {
	// Attach makes the device for a machine. After a reset of the machine it is
	// called again; the device before has been reset by then.
	Attach(g Guest) (Device, error)
	// Info describes the device and what this process did with it; nil: there is
	// nothing to tell. It does not wait.
	Info() Info
	// Close gives everything back. The machine has gone.
	Close() error
}

// Info describes a device at one moment: a value that JSON can carry.
type Info interface {
	// Lines describes it to people, in a line or more.
	Lines() []string
}

// Locker is a [Backend] that must be held by the side that has the right to run
// the guest, and by no other: a disk's lock, a socket's path.
type Locker interface {
	// Lock takes it. Locking again does nothing.
	Lock() error
	// Unlock makes what the guest wrote durable and gives it up. The device is
	// paused. After an error it may still be held.
	Unlock(ctx context.Context) error
}

// Readable is a [Backend] with the bytes of a disk, which its host reads while nothing
// writes them.
type Readable interface {
	io.ReaderAt
	// Size is the disk's size in bytes.
	Size() uint64
}

// Syncer is a [Backend] whose data can be made durable while the guest runs, so
// that little is left for Unlock.
type Syncer interface {
	Sync() error
}

// Sampler is a [Backend] with data that does not travel, since both sides of a
// migration reach it, and that must be the same at both. Both calls return when ctx
// ends; what storage still does for them then touches nothing else.
type Sampler interface {
	// Sample makes what the guest wrote durable, and describes some of the data as
	// the storage has it. nonce, which nobody knows before, chooses what. The device
	// is paused.
	Sample(ctx context.Context, nonce [16]byte) ([]byte, error)
	// Compare fails if the data is not that of which Sample has told at the source.
	// sample comes from a peer.
	Compare(ctx context.Context, nonce [16]byte, sample []byte) error
}

// Announcer is a [Backend] that tells others where the guest is now.
type Announcer interface {
	// Announce is called when a guest that has moved here is about to run.
	Announce()
}

// Feeder is a [Device] that brings input from its host to the guest.
type Feeder interface {
	// Feed brings input until ctx ends; what was read by then is in the device.
	Feed(ctx context.Context) error
}

// Drainer is a [Device] with output that its other end may be slow to take.
type Drainer interface {
	// Drain waits until all output was taken, or ctx ends.
	Drain(ctx context.Context) error
}

// Guest is the machine that a device is made for.
type Guest struct {
	Memory GuestMemory
	// Console is the other end of the machine's virtio console.
	Console Console
	Log     *slog.Logger
}

// GuestMemory is [Memory] with what a device may do to it as a whole;
// *memory.Memory is one.
type GuestMemory interface {
	Memory
	// Punch makes [gpa, gpa+n), whole pages, read as zero, gives their memory
	// back to the host, and marks them dirty.
	Punch(gpa, n uint64) error
	// Size is the guest's memory in bytes.
	Size() uint64
}

// Console is the other end of a line of characters: what the guest writes goes to
// Write, what it reads comes from ReadInput, which waits for input until ctx ends.
type Console interface {
	io.Writer
	ReadInput(ctx context.Context, p []byte) (int, error)
}
