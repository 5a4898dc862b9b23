package vmm

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
)

// ErrMigrationID: the id belongs to another migration. It comes with ErrState.
var ErrMigrationID = errors.New("the migration's id is taken")

// MigrationRecord is what there is to know about one migration from here, also after its end.
type MigrationRecord struct {
	ID       string            `json:"id"`
	VM       string            `json:"vm"`      // its name
	Host     string            `json:"host"`    // name of this host
	Address  string            `json:"address"` // of the destination
	Trigger  string            `json:"trigger"` // who has asked for it: api, cli, drain, or what the caller says
	Started  time.Time         `json:"started"`
	Ended    time.Time         `json:"ended,omitzero"`
	Progress *migrate.Progress `json:"progress,omitempty"` // while it is under way
	Result   *migrate.Result   `json:"result,omitempty"`   // when it has ended
}

// maxRecords is how many migrations a VM remembers.
const maxRecords = 16

// history are the migrations from here, the oldest first. The VM's lifeMu guards it.
type history struct {
	ended  []MigrationRecord // without the last one, as long as that is under way
	keys   map[string]string // of ids: what was asked for
	record func(MigrationRecord)
}

// newMigrationID draws an id.
func newMigrationID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, crypto/rand
	return hex.EncodeToString(b[:])
}

// migrationKey is the same for two requests for the same migration.
func migrationKey(addr string, opt migrate.Options) string {
	sum := sha256.New()
	if c := opt.TLS; c != nil {
		fmt.Fprintf(sum, "%q", c.ServerName)
		for _, cert := range c.Certificates {
			for _, der := range cert.Certificate {
				sum.Write(der)
			}
		}
	}
	if s := opt.Snapshot; s != nil {
		fmt.Fprintf(sum, "%+v", *s)
	}
	opt.TLS, opt.Dial, opt.Notify, opt.Snapshot, opt.Referee, opt.Trigger = nil, nil, nil, nil, nil, ""
	fmt.Fprintf(sum, "%q %+v", addr, opt)
	return string(sum.Sum(nil))
}

// known returns the migration under way, or the last one, if the request is for that one
// again. An id that another request has had is refused. lifeMu is held.
func (v *VM) known(key string, opt migrate.Options) (*outgoing, error) {
	had, ok := v.history.keys[opt.ID]
	if opt.ID == "" || !ok {
		return nil, nil
	}
	switch o := v.outgoing; {
	case had != key:
		return nil, kind.State("%w: %s was asked for with another address or other options", ErrMigrationID, opt.ID)
	case o != nil && o.record.ID == opt.ID:
		return o, nil
	}
	return nil, kind.State("%w: %s has ended, and others came after it", ErrMigrationID, opt.ID)
}

// remember begins a record. lifeMu is held.
func (v *VM) remember(o *outgoing, key string, opt migrate.Options) {
	host, _ := os.Hostname()
	o.record = MigrationRecord{ID: opt.ID, VM: v.name, Host: host, Address: o.addr, Trigger: opt.Trigger, Started: time.Now()}
	if o.record.VM == "" && v.machine != nil {
		o.record.VM = v.machine.Spec().Name
	}
	if o.record.Trigger == "" && opt.Snapshot != nil {
		o.record.Trigger = "snapshot"
	}
	if o.record.Trigger == "" {
		o.record.Trigger = "api"
	}
	if v.history.keys == nil {
		v.history.keys = map[string]string{}
	}
	v.history.keys[opt.ID] = key
}

// conclude ends a record, and gives it to who keeps records. lifeMu is not held.
func (v *VM) conclude(o *outgoing) {
	v.lifeMu.Lock()
	r := o.record
	res := o.Result()
	r.Ended, r.Result = time.Now(), &res
	h := &v.history
	if h.ended = append(h.ended, r); len(h.ended) > maxRecords {
		delete(h.keys, h.ended[0].ID)
		h.ended = slices.Delete(h.ended, 0, 1)
	}
	record := h.record
	v.lifeMu.Unlock()
	if record != nil {
		record(r)
	}
}

// OnMigration sets a function that is called with the record of each migration from here when
// it has ended, before the VM goes on or ends. It is called before [VM.Run].
func (v *VM) OnMigration(record func(MigrationRecord)) {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.history.record = record
}

// Migrations returns what there is to know about the last migrations from here, 16 at most,
// the oldest first.
func (v *VM) Migrations() []MigrationRecord {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	all := slices.Clone(v.history.ended)
	if o := v.outgoing; o != nil && !slices.ContainsFunc(all, func(r MigrationRecord) bool { return r.ID == o.record.ID }) {
		r, p := o.record, o.Progress()
		r.Progress = &p
		all = append(all, r)
	}
	return all
}

// SameMigration reports whether a migration that the VM remembers was asked for in the same
// words; an error matches [ErrMigrationID] if it was not. ok is false if it remembers none of
// this id.
func (v *VM) SameMigration(addr string, opt migrate.Options) (r MigrationRecord, ok bool, err error) {
	key := migrationKey(addr, opt)
	v.lifeMu.Lock()
	had, ok := v.history.keys[opt.ID]
	v.lifeMu.Unlock()
	if !ok || opt.ID == "" {
		return r, false, nil
	}
	if had != key {
		return r, false, kind.State("%w: %s was asked for with another address or other options", ErrMigrationID, opt.ID)
	}
	for _, r := range v.Migrations() {
		if r.ID == opt.ID {
			return r, true, nil
		}
	}
	return r, false, nil
}

// validID reports why a migration cannot have an id.
func validID(id string) error {
	if id == "" {
		return nil
	}
	for i, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return kind.Invalid("id %.80q: must be 1 to 64 of a-z A-Z 0-9 _ . - that start with a letter or digit", id)
		}
	}
	if len(id) > 64 {
		return kind.Invalid("id %.80q: must be at most 64 bytes", id)
	}
	return nil
}
