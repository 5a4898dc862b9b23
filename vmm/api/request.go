package api

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/hosttls"
)

// maxBody bounds what the server reads of a request's body, in bytes.
const maxBody = 256 << 10 // three PEM files of hosttls.MaxFile bytes, and what JSON adds

// Duration is a time.Duration that JSON carries in Go's syntax ("300ms", "1h").
type Duration time.Duration

// MarshalJSON implements [json.Marshaler].
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// UnmarshalJSON implements [json.Unmarshaler]; the duration must be positive.
func (d *Duration) UnmarshalJSON(data []byte) error {
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("duration %.80s: expected a string such as \"300ms\"", data)
	}
	v, err := time.ParseDuration(s)
	if err != nil || v <= 0 {
		return fmt.Errorf("duration %.80q: must be more than 0, such as \"300ms\" or \"1h\"", s)
	}
	*d = Duration(v)
	return nil
}

// MigrateRequest is the body of POST /v1/migration. A field that is left out has
// its default, see [migrate.DefaultOptions].
type MigrateRequest struct {
	To               string    `json:"to" doc:"HOST:PORT of a receiver, or unix:PATH with an absolute path"`
	DowntimeLimit    Duration  `json:"downtime_limit,omitempty" doc:"how long the guest may stand still"`
	BandwidthLimit   uint64    `json:"bandwidth_limit,omitempty" doc:"bytes a second while the guest runs; 0: no limit"`
	Timeout          Duration  `json:"timeout,omitempty" doc:"give up after this time; the guest goes on here"`
	MaxRounds        int       `json:"max_rounds,omitempty" minimum:"0" doc:"give up after so many rounds; 0: no limit"`
	AutoConverge     bool      `json:"auto_converge,omitempty" doc:"slow the guest down if rounds stop shrinking"`
	ClearBitmapShift uint      `json:"clear_bitmap_shift,omitempty" maximum:"31" doc:"clear the dirty log in chunks of 2 to the power of so many pages, 6 to 31; 0: the default"`
	Hints            string    `json:"hints,omitempty" enum:"auto,on,off" doc:"whether to ask the guest which pages are free"`
	HintWait         Duration  `json:"hint_wait,omitempty" doc:"the longest wait for the guest's answer before the first round"`
	Channels         int       `json:"channels,omitempty" minimum:"0" maximum:"16" doc:"connections that carry pages, 1 to 16; 0: the default"`
	Compress         string    `json:"compress,omitempty" enum:"none,zstd,lz4" doc:"how pages are compressed"`
	CopyDisks        bool      `json:"copy_disks,omitempty" doc:"copy the disks that the receiver does not reach"`
	Postcopy         string    `json:"postcopy,omitempty" doc:"let the guest move before all of its memory has: auto, when rounds stop shrinking, or after so many rounds"`
	VerifyPages      bool      `json:"verify_pages,omitempty" doc:"for tests: compare a hash of every page while both sides stand still"`
	ID               string    `json:"id,omitempty" maxLength:"64" pattern:"^[A-Za-z0-9][A-Za-z0-9_.-]*$" doc:"names the migration: a second request with the same id and options starts none; without one an id is drawn"`
	Trigger          string    `json:"trigger,omitempty" maxLength:"32" pattern:"^[a-z][a-z0-9-]*$" doc:"who asks, in a word, as cli or drain; api, unless given"`
	TLS              *TLS      `json:"tls,omitempty" doc:"migrate by TLS; without it connections are plain"`
	Snapshot         *Snapshot `json:"snapshot,omitempty" doc:"take a snapshot: the receiver keeps the guest, and does not run it (govmm snapshot)"`
}

// Snapshot says how a snapshot is taken, see [migrate.Snapshot].
type Snapshot struct {
	Stop     bool     `json:"stop,omitempty" doc:"the guest stands still until it was kept, and then ends here"`
	Patience Duration `json:"patience,omitempty" doc:"how long the guest may stand still, if that is more than for a migration"`
}

// TLS are the credentials of one migration: the contents of PEM files, see
// [hosttls.Credentials], since the VM's process may not be able to read the files. They
// are kept no longer than the migration, and never logged or returned.
type TLS struct {
	CA         string `json:"ca" doc:"PEM"`
	Cert       string `json:"cert" doc:"PEM"`
	Key        string `json:"key" doc:"PEM; kept until the VM's process ends, never logged or returned" writeOnly:"true"`
	ServerName string `json:"server_name,omitempty" doc:"that the receiver's certificate must carry; the host of to, unless given"`
}

// String does not show the key.
func (TLS) String() string { return "TLS credentials" }

// config checks the credentials of a migration to an address.
func (t *TLS) config(to string) (*tls.Config, error) {
	if t == nil {
		return nil, nil
	}
	name, err := hosttls.ServerName(to, t.ServerName)
	if err != nil {
		return nil, err
	}
	return hosttls.Credentials{CA: []byte(t.CA), Cert: []byte(t.Cert), Key: []byte(t.Key)}.Client(name)
}

// Options returns the request's options with the defaults filled in. An error
// matches [vmm.ErrInvalid] and names everything that is wrong.
func (r MigrateRequest) Options() (migrate.Options, error) {
	opt := migrate.DefaultOptions()
	if r.DowntimeLimit != 0 {
		opt.DowntimeLimit = time.Duration(r.DowntimeLimit)
	}
	if r.Timeout != 0 {
		opt.Timeout = time.Duration(r.Timeout)
	}
	if r.ClearBitmapShift != 0 {
		opt.ClearBitmapShift = r.ClearBitmapShift
	}
	if r.Hints != "" {
		opt.Hints = migrate.HintMode(r.Hints)
	}
	if r.HintWait != 0 {
		opt.HintWait = time.Duration(r.HintWait)
	}
	if r.Channels != 0 {
		opt.Channels = r.Channels
	}
	if r.Compress != "" {
		opt.Compression = migrate.Compression(r.Compress)
	}
	opt.BandwidthLimit = r.BandwidthLimit
	opt.MaxRounds = r.MaxRounds
	opt.AutoConverge = r.AutoConverge
	opt.CopyDisks = r.CopyDisks
	opt.VerifyPages = r.VerifyPages
	if r.Snapshot != nil {
		opt.Snapshot = &migrate.Snapshot{Stop: r.Snapshot.Stop, Patience: time.Duration(r.Snapshot.Patience)}
	}
	opt.ID, opt.Trigger = r.ID, r.Trigger
	err := ValidateAddress(r.To)
	if r.Postcopy != "" && err == nil {
		opt.Postcopy, err = ParsePostcopy(r.Postcopy)
	}
	if err == nil {
		if opt.TLS, err = r.TLS.config(r.To); err != nil {
			err = fmt.Errorf("tls: %w", err)
		}
	}
	if err := errors.Join(err, opt.Validate()); err != nil {
		return migrate.Options{}, kind.Invalid("%s", oneLine(err))
	}
	return opt, nil
}

// ValidateAddress reports why s is no HOST:PORT that can be dialled, and no unix:PATH with
// an absolute path; the error matches [vmm.ErrInvalid].
func ValidateAddress(s string) error {
	if strings.HasPrefix(s, migrate.UnixPrefix) {
		if err := migrate.CheckAddress(s); err != nil {
			return kind.Invalid("%w", err)
		}
		return nil
	}
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		var n uint64
		if n, err = strconv.ParseUint(port, 10, 16); err == nil && n != 0 {
			return nil
		}
	}
	return kind.Invalid("address %.80q: expected HOST:PORT, with a port between 1 and 65535, or %sPATH", s, migrate.UnixPrefix)
}

// checkBody returns what of a request's body is to be decoded, "" if nothing.
func checkBody(data []byte) ([]byte, error) {
	if len(data) > maxBody {
		return nil, kind.Invalid("body: must be at most %d bytes", maxBody)
	}
	if data = bytes.TrimSpace(data); len(data) != 0 && data[0] != '{' {
		return nil, kind.Invalid("body: expected a JSON object")
	}
	return data, nil
}
